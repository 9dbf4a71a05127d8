"""Rotations and translations: the grid against scipy, the attack against trying everything."""

import numpy as np
import pytest
import torch
from conftest import LinearVictim, NoisyLogits
from scipy import ndimage
from torch import Tensor, nn

from robustbench_local import spatial
from robustbench_local.attacks import Spatial
from robustbench_local.errors import UserError
from robustbench_local.oracle import Oracle
from robustbench_local.randomness import Draws
from robustbench_local.spatial import Transform
from robustbench_local.threat import BudgetError, ThreatModel

SHAPES = [(1, 28, 28), (3, 32, 32), (2, 20, 31)]
THREAT = ThreatModel(norm="spatial", epsilon=1, access="labels")


def pictures(shape: tuple[int, int, int], count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (2 * torch.rand(count, *shape, generator=generator) - 0.5).clamp(0, 1)


def victim(classes: int = 5, shape: tuple[int, int, int] = (1, 10, 10)) -> LinearVictim:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(classes, int(np.prod(shape)), generator=generator)
    return LinearVictim(weight, -weight.sum(1) / 3)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def test_the_grid_is_that_of_the_paper() -> None:
    grid = spatial.grid()
    assert len(set(grid)) == len(grid) == 31 * 5 * 5 - 1  # all but the identity
    assert len({round(t.rotation, 9) for t in grid}) == 31
    assert {t.right for t in grid} == {t.down for t in grid} == {-1, -0.5, 0, 0.5, 1}
    shares = [t.share for t in grid]
    assert shares == sorted(shares)
    assert (min(shares), max(shares)) == (pytest.approx(2 / 30), 1)
    assert [spatial.largest_move(side) for side in (28, 32, 224)] == [3, 3, 22]
    half = spatial.grid(0.5)
    assert len(half) == 15 * 3 * 3 - 1
    assert set(half) == {t for t in grid if t.share <= 0.5 + 1e-9}
    assert spatial.grid(0.05) == ()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("degrees", [-30, -8, 2, 30])
def test_turns_are_scipys(shape: tuple[int, int, int], degrees: int) -> None:
    x = pictures(shape)
    expected = ndimage.rotate(
        x.double().numpy(), degrees, axes=(3, 2), reshape=False, order=1, mode="grid-constant"
    )
    turned = spatial.apply(x, Transform(degrees / 30, 0, 0))
    np.testing.assert_allclose(turned.numpy(), expected, rtol=0, atol=1e-6)


def test_a_positive_turn_is_anticlockwise_as_it_is_seen() -> None:
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 18] = 1  # on the right, at the height of the centre
    turned = spatial.apply(x, Transform(1, 0, 0))[0, 0]
    row, column = divmod(int(turned.argmax()), 21)
    assert (row, column) == (10 - 4, 10 + 7)  # 8 (sin 30, cos 30) from the centre, upwards


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("right", "down"), [(-1, 0.5), (0.5, -0.5), (0, 1)])
def test_moves_are_scipys(shape: tuple[int, int, int], right: float, down: float) -> None:
    x = pictures(shape)
    pixels = (0, 0, down * spatial.largest_move(shape[1]), right * spatial.largest_move(shape[2]))
    expected = ndimage.shift(x.double().numpy(), pixels, order=1, mode="grid-constant")
    moved = spatial.apply(x, Transform(0, right, down))
    np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_pixels_are_moved_exactly(shape: tuple[int, int, int]) -> None:
    x = pictures(shape)
    assert torch.equal(spatial.apply(x, Transform(0, 0, 0)), x)
    right, down = spatial.largest_move(shape[2]), spatial.largest_move(shape[1])
    expected = torch.zeros_like(x)
    expected[:, :, :-down, right:] = x[:, :, down:, :-right]  # up and to the right
    assert torch.equal(spatial.apply(x, Transform(0, 1, -1)), expected)


def test_an_image_is_turned_before_it_is_moved() -> None:
    x = pictures((1, 28, 28))
    both = spatial.apply(x, Transform(0.6, 1, -1))
    one_by_one = spatial.apply(spatial.apply(x, Transform(0.6, 0, 0)), Transform(0, 1, -1))
    # What the turn alone carries out of the picture is not lost where the move brings it back.
    inner = (slice(None), slice(None), slice(None, -3), slice(3, None))
    torch.testing.assert_close(both[inner], one_by_one[inner], rtol=0, atol=1e-6)


def test_size_recognises_every_transform() -> None:
    x = pictures((1, 28, 28), 1)
    grid = spatial.grid()[::13]
    transformed = torch.cat([spatial.apply(x, transform) for transform in grid])
    shares = torch.tensor([transform.share for transform in grid], dtype=torch.float64)
    found = THREAT.size(transformed, x.expand_as(transformed))
    torch.testing.assert_close(found, shares, rtol=0, atol=1e-12)


def test_size_of_what_is_no_transform() -> None:
    x = pictures((1, 28, 28), 4)
    x_adv = x.clone()
    x_adv[1] = 0.99 * x[1]
    x_adv[2, 0, 14, 14] += 2e-5
    x_adv[3] = spatial.apply(x[3:], Transform(1, 1, 1)) * (1 - 2e-4)
    assert THREAT.size(x_adv, x).tolist() == [0, torch.inf, torch.inf, torch.inf]
    with pytest.raises(BudgetError, match=r"image 1: .*spatial size inf"):
        THREAT.check(x_adv.clamp(0, 1), x)


def test_the_judge_knows_the_budget() -> None:
    x = pictures((1, 28, 28), 3)
    x_adv = spatial.apply(x, Transform(0.6, 0.5, 0))
    ThreatModel(norm="spatial", epsilon=0.6).check(x_adv, x)
    with pytest.raises(BudgetError, match=r"image 0: .*0\.6 exceeds epsilon 0\.59"):
        ThreatModel(norm="spatial", epsilon=0.59).check(x_adv, x)
    radii = THREAT.per_example(torch.tensor([1, 0.5, 1]))
    with pytest.raises(BudgetError, match="image 1"):
        radii.check(x_adv, x)


def test_random_starts_come_from_all_of_the_grid_inside_the_radius() -> None:
    x = torch.rand(300, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    radii = torch.tensor([1.0, 0.5, 0.05]).repeat_interleave(100)
    start = THREAT.per_example(radii).random_start(x, Draws(x, 0))
    sizes = THREAT.size(start, x)
    assert (sizes[:100] > 0.5 + 1e-9).sum() > 50
    assert (sizes <= radii + 1e-9).all()
    assert (sizes[:200] > 0).all()
    assert torch.equal(start[200:], x[200:])  # no element of the grid is that small
    assert len(sizes[:100].unique()) > 8


def brute_force(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """The least share of a scipy transform that the victim gets wrong; infinity where none."""
    least = torch.full((len(x),), torch.inf)
    side = x.shape[-1]
    for degrees in range(-30, 31, 2):
        turned = ndimage.rotate(
            x.double().numpy(), degrees, axes=(3, 2), reshape=False, order=1, mode="grid-constant"
        )
        # One pixel is the largest move here, and half a pixel would be interpolated twice.
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                moved = ndimage.shift(turned, (0, 0, down, right), order=1, mode="grid-constant")
                share = max(abs(degrees) / 30, abs(down), abs(right))
                if share <= epsilon:
                    wrong = predict(model, torch.from_numpy(moved).float()) != y
                    least[wrong] = least[wrong].clamp(max=share)
    assert side == 10
    return least


@pytest.mark.parametrize("epsilon", [0.3, 1])
@pytest.mark.parametrize("candidates", [1, 256])
def test_finds_the_least_transform_that_breaks(epsilon: float, candidates: int) -> None:
    model, x = victim(), pictures((1, 10, 10), 60)
    y = predict(model, x)
    threat = ThreatModel(norm="spatial", epsilon=epsilon, access="labels")
    x_adv = Spatial(candidates=candidates)(model, x, y, threat)
    threat.check(x_adv, x)
    broken = predict(model, x_adv) != y
    least = brute_force(model, x, y, epsilon)
    assert broken.double().mean() > 0.2
    assert (broken >= torch.isfinite(least)).all()
    assert (THREAT.size(x_adv, x)[broken] <= least[broken] + 1e-6).all()


def test_disguised_logits_and_flat_images_change_nothing() -> None:
    model, x = victim(), pictures((1, 10, 10), 60)
    x[::2] = x[::2].round()  # exact 0 and 1
    y = predict(model, x)
    shifted = LinearVictim(model.weight.data, model.bias.data, shift=-50)
    assert torch.equal(Spatial()(model, x, y, THREAT), Spatial()(shifted, x, y, THREAT))
    black = torch.zeros(2, 1, 10, 10)
    assert torch.equal(Spatial()(model, black, predict(model, black), THREAT), black)


def test_a_radius_for_each_example_gives_what_each_alone_gives() -> None:
    model, x = victim(), pictures((1, 10, 10), 30)
    y = predict(model, x)
    radii = torch.tensor([0.1, 0.4, 1.0]).repeat(10)
    together = Spatial()(model, x, y, THREAT.per_example(radii))
    for radius in (0.1, 0.4, 1.0):
        rows = radii == radius
        alone = Spatial()(
            model, x[rows], y[rows], ThreatModel(norm="spatial", epsilon=float(radius))
        )
        assert torch.equal(together[rows], alone)


@pytest.mark.parametrize("budget", [1, 40, 774])
def test_the_query_budget_is_kept(budget: int) -> None:
    model, x = victim(), pictures((1, 10, 10), 30)
    model.bias.data[0] += 30
    y = predict(model, x)
    threat = ThreatModel(norm="spatial", epsilon=1, access="labels", query_budget=budget)
    oracle = Oracle(model, threat, 5)
    oracle.begin(len(x))
    x_adv = Spatial()(oracle, x, y, threat)
    assert int(oracle._spent.max()) == budget
    sizes = THREAT.size(x_adv, x)
    assert (sizes <= spatial.grid()[budget - 1].share + 1e-9).all()


def test_targets_are_reached() -> None:
    model, x = victim(3), pictures((1, 10, 10), 40)
    y = predict(model, x)
    x_adv = Spatial(target="next")(model, x, y, THREAT)
    reached = predict(model, x_adv) == (y + 1) % 3
    elsewhere = predict(model, Spatial()(model, x, y, THREAT)) == (y + 1) % 3
    assert reached.sum() > elsewhere.sum()


def test_one_lucky_draw_decides_nothing() -> None:
    model, x = victim(2), pictures((1, 10, 10), 40)
    y = predict(model, x)
    with torch.no_grad():
        margin = model(x).topk(2).values.diff().abs().mean()
    noisy = NoisyLogits(model, float(margin) / 2)
    noisy.randomized = True
    broken = [
        int((predict(model, attack(noisy, x, y, THREAT)) != y).sum())
        for attack in (Spatial(eot_samples=20), Spatial())
    ]
    exact = int((predict(model, Spatial()(model, x, y, THREAT)) != y).sum())
    assert broken[1] <= exact
    assert exact - 2 <= broken[0] <= exact


def test_a_radius_that_is_no_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"threat\.epsilon=30 .* share"):
        ThreatModel(norm="spatial", epsilon=30)


def test_what_only_a_ball_has_is_refused() -> None:
    x = pictures((1, 10, 10))
    for ask in (lambda: THREAT.project(x, x), lambda: THREAT.direction(x, x, 0.1)):
        with pytest.raises(UserError, match=r"threat\.norm=spatial .* attack=spatial"):
            ask()


@pytest.mark.parametrize(
    ("key", "value"), [("eot_samples", 0), ("candidates", 1.5), ("target", "nearest")]
)
def test_bad_hyper_parameters_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"attack\.{key}={value}; expected"):
        Spatial(**{key: value})

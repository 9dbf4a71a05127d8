"""Pixel attacks against brute force, closed forms and disguised victims."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchattacks
from conftest import LinearVictim, LogSoftmax, NoisyLogits, Recording
from numpy.typing import NDArray
from torch import Tensor, nn

from robustbench_local.attacks import OnePixel, OnePixelExhaustive
from robustbench_local.attacks.pixels import Memory, paint
from robustbench_local.errors import UserError
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel

SHAPES = [(1, 8, 8), (3, 5, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)

QUICK = OnePixel(population=200, generations=40)


def threat(pixels: int = 1, budget: int | None = None) -> ThreatModel:
    return ThreatModel(norm="l0", epsilon=pixels, access="scores", query_budget=budget)


def images(shape: tuple[int, int, int], count: int, seed: int = 0) -> Tensor:
    """A third of the pixels exactly 0, a third exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.rand(count, *shape, generator=generator) - 1).clamp_(0, 1)


def linear(shape: tuple[int, int, int], classes: int, **how: float) -> LinearVictim:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(classes, int(np.prod(shape)), generator=generator)
    return LinearVictim(weight, -weight.sum(1) / 2, **how)


class Curved(nn.Module):
    """A small convolutional network with random weights, in float64 inside."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(channels)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 8, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(classes)
            ).double()

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.layers(x.double()).to(x.dtype)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def brute_force(model: nn.Module, x: Tensor, levels: int, aim: Tensor | None = None) -> list[bool]:
    """Whether one pixel of a grid turns the prediction of each image, by plain loops."""
    values = torch.linspace(0, 1, levels)
    before, broken = predict(model, x), []
    for image in range(len(x)):
        tries = []
        for row, column in itertools.product(range(x.shape[2]), range(x.shape[3])):
            for colour in itertools.product(values, repeat=x.shape[1]):
                one = x[image].clone()
                one[:, row, column] = torch.stack(colour)
                tries.append(one)
        after = predict(model, torch.stack(tries))
        hit = after != before[image] if aim is None else after == aim[image]
        broken.append(bool(hit.any()))
    return broken


def contested(model: nn.Module, x: Tensor, count: int, levels: int = 3) -> tuple[Tensor, Tensor]:
    """Images of which one pixel turns about half, and which these are."""
    with torch.no_grad():
        best = model(x).topk(2, dim=1).values
    x = x[(best[:, 0] - best[:, 1]).argsort()]
    step = len(x) // 20
    edge = sum(brute_force(model, x[::step], levels)) * step  # where along the margins success ends
    x = x[torch.linspace(0, min(2 * edge, len(x) - 1), count).long()]
    exact = torch.tensor(brute_force(model, x, levels))
    assert 0.15 <= float(exact.double().mean()) <= 0.85
    return x, exact


victims = pytest.mark.parametrize("kind", ["linear", "curved"])


def victim(kind: str, shape: tuple[int, int, int], classes: int = 4) -> nn.Module:
    model = linear(shape, classes) if kind == "linear" else Curved(shape[0], classes)
    predict(model, images(shape, 1))  # shapes of lazy layers
    return model


@shapes
@victims
def test_evolution_finds_what_the_exhaustive_search_finds(
    kind: str, shape: tuple[int, int, int]
) -> None:
    model = victim(kind, shape)
    x, exact = contested(model, images(shape, 300), 40)
    y = predict(model, x)

    grid = OnePixelExhaustive(levels=3)(model, x, y, threat())
    assert torch.equal(predict(model, grid) != y, exact)

    found = predict(model, QUICK(model, x, y, threat())) != y
    assert found[exact].double().mean() >= 0.95
    # Between the levels of the grid a linear victim has no more to find.
    if kind == "linear":
        assert not found[~exact].any()


@shapes
def test_targeted_evolution_finds_what_the_exhaustive_search_finds(
    shape: tuple[int, int, int],
) -> None:
    model = victim("linear", shape)
    x = images(shape, 120)
    y = predict(model, x)
    aim = (y + 1) % 4
    exact = torch.tensor(brute_force(model, x, levels=2, aim=aim))
    assert 0.1 <= float(exact.double().mean()) <= 0.9
    grid = OnePixelExhaustive(levels=2, target="next")(model, x, y, threat())
    assert torch.equal(predict(model, grid) == aim, exact)
    attack = OnePixel(population=200, generations=40, target="next")
    found = predict(model, attack(model, x, y, threat())) == aim
    assert found[exact].double().mean() >= 0.95


def gains(model: LinearVictim, x: Tensor, y: Tensor) -> NDArray[np.float64]:
    """How far each pixel alone can raise the wrong class over the true one, (N, H*W).

    Two classes: every channel goes to the end of the box that its weight points at.
    """
    weight = model.weight.detach().numpy()
    flat = x.flatten(1).double().numpy()
    slope = np.where(y.numpy()[:, None] == 0, weight[1] - weight[0], weight[0] - weight[1])
    rise = np.where(slope > 0, slope * (1 - flat), -slope * flat)
    return rise.reshape(len(x), x.shape[1], -1).sum(1)


def margin(model: nn.Module, x: Tensor, y: Tensor) -> NDArray[np.float64]:
    with torch.no_grad():
        logits = model(x).double()
    return (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1).numpy()


@shapes
@pytest.mark.parametrize("pixels", [1, 3])
def test_a_linear_victim_falls_exactly_where_it_can(
    shape: tuple[int, int, int], pixels: int
) -> None:
    """The best k pixels of a linear victim are the k with the largest gain.

    Evolution finds the best one; of three, nine or fifteen numbers, it comes near.
    """
    near = 0.97 if pixels == 1 else 0.85
    model, x = linear(shape, 2), images(shape, 600)
    y = predict(model, x)
    rise = np.sort(gains(model, x, y), axis=1)[:, -pixels:].sum(1)
    contest = np.abs(margin(model, x, y) / rise - 1) < 0.4
    x, y, rise = x[contest][:60], y[contest][:60], rise[contest][:60]
    before = margin(model, x, y)
    attack = OnePixel(population=200, generations=50 * pixels)
    x_adv = attack(model, x, y, threat(pixels))
    threat(pixels).check(x_adv, x)
    after = margin(model, x_adv, y)
    broken = after < 0
    assert not (broken & (before - rise > 1e-4)).any()
    assert 0.1 < broken.mean() < 0.9
    assert broken[before < near * rise].mean() >= 0.95
    # The images that resist come back with what is nearly the strongest change there is.
    assert ((before - after) / rise)[~broken].mean() >= near


@pytest.mark.slow
def test_on_digits_evolution_misses_nothing(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """Digits near another class, all colours of a grid at all 784 places."""
    x = digit_images[0]
    with torch.no_grad():
        best = digit_model(x).topk(2, dim=1).values
    x = x[(best[:, 0] - best[:, 1]).argsort()[:144:6]]
    y = predict(digit_model, x)
    exact = predict(digit_model, OnePixelExhaustive(levels=3)(digit_model, x, y, threat())) != y
    assert 5 <= int(exact.sum()) <= 19
    found = predict(digit_model, OnePixel()(digit_model, x, y, threat())) != y
    assert found[exact].double().mean() >= 0.95


@pytest.mark.slow
def test_at_least_as_strong_as_torchattacks() -> None:
    """Equal populations and generations, on images of which some fall and some do not."""
    model, x = linear((3, 8, 8), 4), images((3, 8, 8), 500)
    with torch.no_grad():
        best = model(x).topk(2, dim=1).values
    x = x[(best[:, 0] - best[:, 1]).argsort()][240:380:2]
    y = predict(model, x)
    theirs = torchattacks.OnePixel(model, pixels=1, steps=30, popsize=100)
    state = np.random.get_state()
    np.random.seed(0)
    broken = float((predict(model, theirs(x, y)) != y).double().mean())
    np.random.set_state(state)
    x_adv = OnePixel(population=100, generations=30)(model, x, y, threat())
    assert 0.3 < broken < 0.9
    assert float((predict(model, x_adv) != y).double().mean()) >= broken - 1 / len(x)


def test_more_pixels_break_more() -> None:
    model, x = linear((1, 8, 8), 4), images((1, 8, 8), 60)
    y = predict(model, x)
    broken = []
    for pixels in (1, 3, 5):
        x_adv = QUICK(model, x, y, threat(pixels))
        changed = (x_adv != x).any(1).flatten(1).sum(1)
        assert int(changed.max()) <= pixels
        broken.append(int((predict(model, x_adv) != y).sum()))
    assert broken[0] < broken[1] < broken[2]


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [1, 2])
@pytest.mark.parametrize("disguise", ["shift", "scale up", "log-softmax", "saturated"])
def test_no_disguise_of_the_scores_helps(disguise: str, pixels: int) -> None:
    plain = linear((1, 8, 8), 5)
    x = images((1, 8, 8), 100) if pixels == 2 else contested(plain, images((1, 8, 8), 400), 100)[0]
    y = predict(plain, x)
    steep = linear((1, 8, 8), 5, scale=100)
    hidden = {
        "shift": linear((1, 8, 8), 5, shift=-50),
        "scale up": linear((1, 8, 8), 5, scale=1e4),
        "log-softmax": LogSoftmax(plain),
        "saturated": LogSoftmax(steep),  # every probability is 0 or 1 in float32
    }[disguise]
    if disguise == "saturated":
        with torch.no_grad():
            assert (hidden(x).exp().amax(1) == 1).double().mean() > 0.9
    share, share_hidden = (
        float((predict(plain, QUICK(model, x, y, threat(pixels))) != y).double().mean())
        for model in (plain, hidden)
    )
    assert 0.2 < share < 0.98, share
    assert share_hidden >= share - 0.01 - 1e-9


class Stubborn(nn.Module):
    """Always class 0, with a score that depends on the pixels: nothing breaks it."""

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) * torch.linspace(-1, 1, x[0].numel())).sum(1)
        return torch.stack((50 + score, -score), 1)


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_no_image_is_asked_about_twice_and_the_search_is_the_same(
    pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pixel of 8x8 images has 64 * 256 colours: most of the later candidates are repeats."""
    # No pixel has one of the 256 levels, so that no candidate is the clean image.
    x = ((254 * images((1, 8, 8), 2)).floor() + 0.5) / 255
    y = torch.zeros(2, dtype=torch.int64)
    attack = OnePixel(population=50, generations=60)
    record = Recording(Stubborn())
    x_adv = attack(record, x, y, threat(pixels))
    seen = torch.cat(record.seen)
    distinct = len(seen.flatten(1).unique(dim=0))
    if pixels == 1:
        assert len(seen) < 1.03 * distinct  # the memory is not endless
        assert len(seen) < 0.3 * 2 * 50 * 61
    if pixels == 2:  # not of four: their numbers would be too long
        assert len(seen) < 0.9 * 2 * 50 * 61
    monkeypatch.setattr(Memory, "fits", lambda *numbers: False)
    forgetful = Recording(Stubborn())
    assert torch.equal(attack(forgetful, x, y, threat(pixels)), x_adv)
    assert sum(map(len, forgetful.seen)) == 2 * 50 * 61
    assert len(torch.cat(forgetful.seen).flatten(1).unique(dim=0)) == distinct


@pytest.mark.parametrize("candidates", [7, 64, None])
def test_the_size_of_a_forward_pass_is_bounded_and_does_not_matter(candidates: int | None) -> None:
    model = Curved(1, 4)
    x = images((1, 8, 8), 6)
    y = predict(model, x)
    for attack in (
        OnePixel(population=12, generations=6, candidates=candidates),
        OnePixelExhaustive(levels=2, candidates=candidates),
    ):
        record = Recording(model)
        x_adv = attack(record, x, y, threat())
        longest = max(len(part) for part in record.seen)
        assert longest <= (candidates or 2048)
        other = replace(attack, candidates=50)
        assert torch.equal(other(model, x, y, threat()), x_adv)


@pytest.mark.parametrize("target", [None, "next", "least_likely"])
@pytest.mark.parametrize("budget", [1, 5, 40, 41, 99, 100_000])
@pytest.mark.parametrize("pixels", [1, 5])
def test_the_query_budget_is_kept_to_the_last_query(
    pixels: int, budget: int, target: str | None
) -> None:
    """Nothing breaks the victim, so every image uses what it may."""
    x, y = images((1, 8, 8), 3), torch.zeros(3, dtype=torch.int64)
    for attack, most in (
        (OnePixel(population=40, generations=9, target=target), 40 * 10),
        (OnePixelExhaustive(levels=3, target=target), 64 * 3),
    ):
        if target is not None:
            continue_with = StubbornTarget()
            most += 1
        else:
            continue_with = Stubborn()
        oracle = Oracle(continue_with, threat(pixels, budget), 2)
        oracle.begin(len(x))
        x_adv = attack(oracle, x, y, threat(pixels, budget))
        spent = oracle._spent.tolist()
        assert max(spent) <= min(budget, most)
        if budget <= 100:
            assert min(spent) >= min(budget, most) - (0 if budget <= 40 else 3 * budget // 4)
        threat(pixels).check(x_adv, x)


class StubbornTarget(Stubborn):
    """Always class 0, also where class 1 is wanted."""


def test_a_larger_budget_never_breaks_less() -> None:
    model = linear((1, 8, 8), 4)
    x, _ = contested(model, images((1, 8, 8), 600), 100)
    y = predict(model, x)
    broken = [
        predict(model, QUICK(model, x, y, threat(1, budget))) != y
        for budget in (10, 60, 300, 100_000)
    ]
    assert all((less <= more).all() for less, more in itertools.pairwise(broken))
    assert int(broken[0].sum()) < int(broken[1].sum()) < int(broken[3].sum())


@pytest.mark.parametrize("pixels", [1, 4])
def test_every_image_gets_its_own_result(pixels: int) -> None:
    """Images leave at different generations; a mix-up of rows would give other images' pixels."""
    model = Curved(3, 5)
    x = images((3, 5, 6), 60)
    y = predict(model, x)
    attack = OnePixel(population=30, generations=15)
    x_adv = attack(model, x, y, threat(pixels))
    threat(pixels).check(x_adv, x)
    rows = range(0, len(x), 7)
    alone = torch.cat([attack(model, x[[i]], y[[i]], threat(pixels)) for i in rows])
    assert torch.equal(alone, x_adv[::7])


def test_an_image_leaves_as_soon_as_it_is_broken() -> None:
    """A victim that any pixel turns costs one generation; only the others are asked about on."""

    class Touchy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            touched = (x != 0.5).flatten(1).any(1) & (x[:, 0, 0, 0] != 0.25)
            return torch.stack((~touched, touched), 1).float()

    x = torch.full((4, 1, 8, 8), 0.5)
    x[2:, :, 0, 0] = 0.25  # these resist
    y = torch.zeros(4, dtype=torch.int64)
    oracle = Oracle(Touchy(), threat(1, 10**6), 2)
    oracle.begin(4)
    x_adv = OnePixel(population=20, generations=5)(oracle, x, y, threat())
    assert oracle._spent[:2].tolist() == [19, 19]  # one of 20 came twice
    assert int(oracle._spent[2:].min()) > 20
    assert (predict(Touchy(), x_adv[:2]) == 1).all()


@pytest.mark.parametrize(
    ("samples", "budget", "least"),
    [(1, None, 0.75), (1, 900, 0.6), (1, 110, 0.3), (10, None, 0.95)],
)
def test_a_lucky_draw_is_not_believed(samples: int, budget: int | None, least: float) -> None:
    """Under noise on the scores the result still comes near the strongest change."""
    model, x = linear((1, 8, 8), 2), images((1, 8, 8), 240)
    y = predict(model, x)
    noisy = NoisyLogits(model, 1.0)
    oracle = Oracle(noisy, threat(1, budget), 2, randomized=True)
    oracle.begin(len(x))
    attack = OnePixel(population=50, generations=40, eot_samples=samples)
    x_adv = attack(oracle, x, y, threat(1, budget))
    if budget is None:
        assert oracle.forward_passes == len(x) * 50 * 41 * samples  # no image leaves
    rise = margin(model, x, y) - margin(model, x_adv, y)
    assert (rise / gains(model, x, y).max(1)).mean() >= least


@pytest.mark.parametrize("randomized", [True, False])
def test_a_random_victim_is_searched_for_its_own_number_of_generations(randomized: bool) -> None:
    model, x = linear((1, 8, 8), 2), images((1, 8, 8), 6)
    y = predict(model, x)
    victim = NoisyLogits(model, 1e-6) if randomized else model
    oracle = Oracle(victim, threat(1), 2, randomized=randomized)
    oracle.begin(len(x))
    attack = OnePixel(population=50, generations=9, random_generations=3, eot_samples=2)
    attack(oracle, x, y, threat(1))
    if randomized:
        assert oracle.forward_passes == len(x) * 50 * (3 + 1) * 2
        assert attack.report(threat(1))["reduced"].startswith("3 generations instead of 9")
    else:
        full = Oracle(model, threat(1), 2, randomized=False)
        full.begin(len(x))
        OnePixel(population=50, generations=9)(full, x, y, threat(1))
        assert oracle.forward_passes == full.forward_passes
        assert attack.report(threat(1)) == {}


@pytest.mark.parametrize("generations", [9, 12])
def test_as_many_generations_or_more_are_no_reduction(generations: int) -> None:
    model, x = linear((1, 8, 8), 2), images((1, 8, 8), 2)
    oracle = Oracle(NoisyLogits(model, 1e-6), threat(1), 2, randomized=True)
    oracle.begin(len(x))
    attack = OnePixel(population=50, generations=9, random_generations=generations)
    attack(oracle, x, predict(model, x), threat(1))
    assert oracle.forward_passes == len(x) * 50 * (generations + 1)
    assert attack.report(threat(1)) == {}


def test_paint_changes_the_pixels_and_nothing_else() -> None:
    x = images((3, 4, 5), 3)
    rows = torch.tensor([2, 0])
    places = torch.tensor([[3, 7], [19, 19]])
    colours = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0))
    painted = paint(x, rows, places, colours)
    expected = x[rows].clone()
    expected[0, :, 0, 3], expected[0, :, 1, 2] = colours[0, 0], colours[0, 1]
    expected[1, :, 3, 4] = colours[1, 1]
    assert torch.equal(painted, expected)


def test_a_memory_tells_all_images_apart() -> None:
    places, levels = torch.tensor([0, 783]), torch.tensor([0, 1, 255])
    grid = torch.cartesian_prod(places, levels, places, levels, torch.tensor([0, 5]))
    where, colour = grid[:, [0, 2]], grid[:, [1, 3], None]
    keys = Memory.keys(grid[:, 4], where, colour, 784)
    assert len(keys.unique()) == len(grid)
    memory = Memory(torch.zeros(6, 1, 28, 28))
    assert not memory.recall(keys)[0].any()
    memory.store(keys, keys.float().sqrt())
    known, answers = memory.recall(keys)
    assert known.double().mean() > 0.9
    assert torch.equal(answers[known], keys[known].float().sqrt())
    assert not memory.recall(keys + 1)[0][~torch.isin(keys + 1, keys)].any()


@pytest.mark.parametrize("attack", [OnePixel(), OnePixelExhaustive()], ids=["evolution", "grid"])
def test_more_pixels_than_there_are_is_told(attack: OnePixel | OnePixelExhaustive) -> None:
    model, x = linear((1, 8, 8), 2), images((1, 8, 8), 2)
    with pytest.raises(UserError, match=r"threat\.epsilon=65 .* have 64 \(8x8\)"):
        attack(model, x, predict(model, x), threat(65))


@pytest.mark.parametrize("epsilon", ["-1", "1.5", "nan", "one"])
def test_pixels_that_cannot_be_counted_are_refused(epsilon: str) -> None:
    with pytest.raises(UserError, match=r"threat\.epsilon="):
        ThreatModel(norm="l0", epsilon=epsilon, access="scores")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"population": 0}, "attack.population=0"),
        ({"population": -400}, "attack.population=-400"),
        ({"population": 2}, "attack.population=2.*3 or more"),
        ({"population": 4.5}, "attack.population=4.5"),
        ({"generations": 0}, "attack.generations=0"),
        ({"random_generations": 0}, "attack.random_generations=0"),
        ({"candidates": 0}, "attack.candidates=0"),
        ({"eot_samples": 0}, "attack.eot_samples=0"),
        ({"mutation": 0.0}, "attack.mutation=0"),
        ({"mutation": float("nan")}, "attack.mutation=nan"),
        ({"mutation": 2.5}, "attack.mutation=2.5"),
        ({"target": "anything"}, "attack.target=anything"),
    ],
)
def test_settings_without_sense_are_told(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        OnePixel(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("levels", [1, 0, -3, 2.5, True])
def test_a_grid_needs_two_levels(levels: int) -> None:
    with pytest.raises(UserError, match=rf"attack\.levels={levels}"):
        OnePixelExhaustive(levels=levels)

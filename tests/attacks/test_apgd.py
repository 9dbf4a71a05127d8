"""Auto-PGD against exact worst cases, the paper's algorithm step by step, and its authors' code."""

import numpy as np
import pytest
import torch
from conftest import LinearVictim, LogSoftmax, NoisyLogits, accuracy
from numpy.typing import NDArray
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from test_closed_forms import images, margins, middling_epsilon, nearest, predict, victim
from torch import Tensor, nn

from robustbench_local.attacks import APGD, PGD
from robustbench_local.attacks.ascent import checkpoints, phases
from robustbench_local.errors import UserError
from robustbench_local.gradients import targeted_dlr
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

Array = NDArray[np.float64]
norms = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
losses = pytest.mark.parametrize("loss", ["ce", "dlr", "dlr_targeted"])

ROUNDING = 1e-4


def threat(norm: Norm, epsilon: float) -> ThreatModel:
    return ThreatModel(norm=norm, epsilon=epsilon)


@losses
@norms
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 6)], ids=str)
def test_breaks_exactly_what_can_be_broken(
    shape: tuple[int, int, int], norm: Norm, loss: str
) -> None:
    """Two classes: the DLR losses fall back to the difference of the logits."""
    model, x = victim(shape, 2), images(shape)
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm)
    breakable = margins(model, x, y, norm, 0.99 * epsilon)[:, 0] < -ROUNDING
    safe = margins(model, x, y, norm, epsilon)[:, 0] > ROUNDING
    assert min(breakable.mean(), safe.mean()) > 0.4

    x_adv = APGD(loss=loss)(model, x, y, threat(norm, epsilon))

    broken = (predict(model, x_adv) != y).numpy()
    assert not (broken & safe).any()
    assert not (breakable & ~broken).any()


@norms
def test_climbs_nearly_to_the_optimum(norm: Norm) -> None:
    """Where nothing can be broken the best point has 99% of the largest possible rise."""
    model, x = victim((1, 8, 8), 2), images((1, 8, 8))
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm) / 2
    before, after = (margins(model, x, y, norm, radius)[:, 0] for radius in (0, epsilon))
    resists = after > ROUNDING
    assert resists.mean() > 0.5

    x_adv = APGD()(model, x, y, threat(norm, epsilon))

    reached = before - margins(model, x_adv, y, norm, 0)[:, 0]
    assert (reached / (before - after))[resists].min() >= 0.99


@pytest.mark.slow
@norms
@pytest.mark.parametrize("classes", [3, 4, 7])
def test_targeted_dlr_is_exact_on_many_classes(norm: Norm, classes: int) -> None:
    model, x = victim((1, 8, 8), classes), images((1, 8, 8), 100)
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm)
    # A radius smaller by 0.5% allows for where ascents along many classes come to rest.
    breakable = margins(model, x, y, norm, 0.995 * epsilon).min(1) < -ROUNDING
    x_adv = APGD(loss="dlr_targeted", steps=60)(model, x, y, threat(norm, epsilon))
    assert not (breakable & (predict(model, x_adv) == y).numpy()).any()


@norms
@losses
@pytest.mark.parametrize(
    "variant",
    ["shift", *(pytest.param(v, marks=pytest.mark.slow) for v in ("log-softmax", "scale up"))],
)
def test_no_disguise_of_the_logits_helps(norm: Norm, loss: str, variant: str) -> None:
    plain, x = victim((1, 8, 8), 5), images((1, 8, 8), 100)
    y = predict(plain, x)
    epsilon = middling_epsilon(plain, x, y, norm)
    model = {
        "shift": LinearVictim(plain.weight.data, plain.bias.data, shift=-50),
        "scale up": LinearVictim(plain.weight.data, plain.bias.data, scale=1e4),
        "log-softmax": LogSoftmax(plain),
    }[variant]
    attack = APGD(loss=loss, steps=25, targets=2)
    survivors, disguised = (
        int((predict(plain, attack(victim_, x, y, threat(norm, epsilon))) == y).sum())
        for victim_ in (plain, model)
    )
    assert disguised <= survivors + 1


def test_targeted_dlr_by_hand() -> None:
    """(z_t - z_y) / (z_1 - (z_3 + z_4) / 2), for two orders of five logits."""
    logits = torch.tensor([[1.0, 7.0, 3.0, -2.0, 4.0], [1.0, 7.0, 3.0, -2.0, 4.0]])
    y, wanted = torch.tensor([1, 2]), torch.tensor([4, 3])
    expected = torch.tensor([(4 - 7) / (7 - 2.0), (-2 - 3) / (7 - 2.0)])
    torch.testing.assert_close(targeted_dlr(logits, y, wanted), expected)
    torch.testing.assert_close(targeted_dlr(3 * logits - 50, y, wanted), expected)
    three = torch.tensor([[1.0, 7.0, 3.0]])
    assert targeted_dlr(three, torch.tensor([1]), torch.tensor([2])).item() == -4


def test_the_checkpoints_are_those_of_the_paper() -> None:
    """Stretches of 22, 19, 16, 13, 10 and 7 of 100 steps, then of 6."""
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000) == [220, 410, 570, 700, 800, 870, 930, 990]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]
    assert checkpoints(1) == [1]


def test_the_l1_radii_are_those_of_the_paper() -> None:
    assert phases(100) == [(3, 30), (2, 30), (1, 40)]
    assert phases(10) == [(3, 3), (2, 3), (1, 4)]
    assert phases(3) == [(1, 3)]


class Wavy(nn.Module):
    """Two classes whose score is neither linear nor concave; class 1 is never lost."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = torch.randn(pixels, 3, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        score = 9 + (2 * x.flatten(1).double() @ self.first).sin().sum(1)
        return torch.stack((torch.zeros_like(score), score), 1)


def by_the_book(model: nn.Module, x: Tensor, norm: Norm, epsilon: float, steps: int) -> float:
    """Algorithm 1 of the paper for one image in plain numpy: the highest loss."""

    def look(point: Array) -> tuple[float, Array]:
        pixels = torch.from_numpy(point).view(1, 1, 4, 4).requires_grad_()
        score = model(pixels)[0, 1]
        (gradient,) = torch.autograd.grad(-score, pixels)
        return -score.item(), gradient.numpy().reshape(1, -1)

    def along(gradient: Array) -> Array:
        return np.sign(gradient) if norm == "linf" else gradient / np.linalg.norm(gradient)

    def project(point: Array) -> Array:
        return nearest(point, start, norm, epsilon)

    start = x.double().numpy().reshape(1, -1)
    marks = {-(-share * steps // 100) for share in (22, 41, 57, 70, 80, 87, 93, 99)}
    here, before, stride = start, start, 2 * epsilon
    values: list[float] = []
    best = (-np.inf, start, start)
    last, best_then, halved = 0, 0.0, False
    for step in range(steps + 1):
        value, gradient = look(here)
        values.append(value)
        if value > best[0]:
            best = (value, here, gradient)
        if step == 0:
            best_then = value
        elif step in marks:
            rises = sum(values[i + 1] > values[i] for i in range(last, step))
            halved = rises < 0.75 * (step - last) or (not halved and best[0] == best_then)
            last, best_then = step, best[0]
            if halved:
                stride /= 2
                _, here, gradient = best
        moved = project(here + stride * along(gradient))
        if step > 0:
            moved = project(here + 0.75 * (moved - here) + 0.25 * (here - before))
        here, before = moved, here
    return best[0]


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.25), ("l2", 0.6)])
def test_every_step_is_that_of_the_paper(norm: Norm, epsilon: float) -> None:
    """In float64, from the image itself, so that nothing but the rules decides."""
    model, x = Wavy(16), images((1, 4, 4), 8).double()
    y = torch.ones(len(x), dtype=torch.int64)
    attack = APGD(steps=40, random_start=False, loss="dlr")
    x_adv = attack(model, x, y, threat(norm, epsilon))
    expected = [by_the_book(model, image, norm, epsilon, 40) for image in x]
    # Where a step size or a checkpoint is off by one, several images end elsewhere.
    np.testing.assert_allclose(-model(x_adv)[:, 1].numpy(), expected, rtol=0, atol=1e-5)


class Counting(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.model(x)


@norms
def test_broken_images_leave_the_batch(norm: Norm) -> None:
    plain, x = victim((1, 8, 8), 5), images((1, 8, 8), 100)
    y = predict(plain, x)
    epsilon = 2 * middling_epsilon(plain, x, y, norm)
    easy = torch.from_numpy(margins(plain, x, y, norm, epsilon / 2).min(1) < 0)
    x, y, model = x[easy], y[easy], Counting(plain)
    passes = {}
    for loss in ("ce", "dlr_targeted"):
        model.images = 0
        x_adv = APGD(loss=loss, steps=20)(model, x, y, threat(norm, epsilon))
        passes[loss] = model.images / len(x)
        assert not (predict(model, x_adv) == y).any()
    # Of l1 the first 12 steps, and the looks that end them, are in wider balls.
    before = 14 if norm == "l1" else 0
    assert passes["ce"] <= before + 5
    assert passes["dlr_targeted"] <= before + 6


@pytest.mark.slow
@norms
@losses
def test_every_image_gets_its_own_result(norm: Norm, loss: str) -> None:
    """Images leave at different steps, with radii of their own; a mix-up would land far outside."""
    model, x = victim((3, 6, 6), 5), images((3, 6, 6), 48)
    y = predict(model, x)
    radii = middling_epsilon(model, x, y, norm) * torch.linspace(0.4, 1.2, len(x))
    attack = APGD(steps=9, restarts=2, loss=loss, targets=2)
    together = threat(norm, 0.1).per_example(radii)
    x_adv = attack(model, x, y, together)
    together.check(x_adv, x)
    broken = predict(model, x_adv) != y
    assert 5 < int(broken.sum()) < 43
    alone = [attack(model, x[[i]], y[[i]], threat(norm, float(radii[i]))) for i in range(0, 48, 8)]
    torch.testing.assert_close(x_adv[::8], torch.cat(alone), rtol=0, atol=2e-6)


@norms
def test_restarts_of_its_own_are_ten_under_l1(norm: Norm) -> None:
    model, x = victim((1, 8, 8), 5), images((1, 8, 8), 30)
    y = predict(model, x)
    around = threat(norm, middling_epsilon(model, x, y, norm))
    own, one, ten = (
        APGD(steps=4, restarts=restarts)(model, x, y, around) for restarts in (None, 1, 10)
    )
    assert torch.equal(own, ten) == (norm == "l1")
    assert torch.equal(own, one) == (norm != "l1")


@pytest.mark.parametrize("deviation", [3.0, 30.0])
@norms
def test_a_lucky_draw_is_not_the_best_point(norm: Norm, deviation: float) -> None:
    """Under noise on the logits what is returned is close to the worst case of the mean logits."""
    model, x = victim((1, 8, 8), 2), images((1, 8, 8))
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm) / 4
    before = margins(model, x, y, norm, 0)[:, 0]
    possible = before - margins(model, x, y, norm, epsilon)[:, 0]
    noisy = NoisyLogits(model, deviation)
    x_adv = APGD(eot_samples=5, steps=50)(noisy, x, y, threat(norm, epsilon))
    reached = before - margins(model, x_adv, y, norm, 0)[:, 0]
    assert float((reached / possible).mean()) >= (0.9 if norm == "l1" else 0.95)


def test_randomised_victims_see_every_step() -> None:
    """No image leaves on a lucky draw; the two points compared at the end are looked at afresh."""
    model = Counting(NoisyLogits(victim((1, 8, 8), 5), 1e3))
    x = images((1, 8, 8), 20)
    y = torch.zeros(20, dtype=torch.int64)
    APGD(steps=10, eot_samples=3)(model, x, y, threat("linf", 0.1))
    assert model.images == 20 * 3 * (10 + 1 + 2)


@pytest.mark.parametrize("wanted", [2, "next"])
def test_reaches_the_class_it_is_told(wanted: int | str) -> None:
    model, x = victim((1, 8, 8), 4), images((1, 8, 8), 60)
    y = predict(model, x)
    goal = torch.full_like(y, 2) if wanted == 2 else (y + 1) % 4
    x_adv = APGD(target=wanted)(model, x, y, threat("linf", 0.5))
    assert float((predict(model, x_adv) == goal).double().mean()) >= 0.99
    x_adv = APGD(target=wanted, loss="dlr")(model, x, y, threat("linf", 0.5))
    assert float((predict(model, x_adv) == goal).double().mean()) >= 0.99


RADII: dict[Norm, float] = {"linf": 0.1, "l2": 1.5, "l1": 8}


@pytest.mark.slow
@norms
def test_more_steps_and_restarts_break_more(
    norm: Norm, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:100] for part in digit_images)
    left = [
        accuracy(digit_model, APGD(steps=steps)(digit_model, x, y, threat(norm, RADII[norm])), y)
        for steps in (2, 10, 40)
    ]
    assert left[0] > left[2]
    assert left[0] + 0.01 >= left[1] >= left[2] - 0.01
    broken = [
        predict(
            digit_model,
            APGD(steps=10, restarts=restarts)(digit_model, x, y, threat(norm, RADII[norm])),
        )
        != y
        for restarts in (1, 3)
    ]
    assert (broken[0] <= broken[1]).all()


def authors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    epsilon: float,
    loss: str,
    steps: int,
    *,
    seed: int = 0,
) -> Tensor:
    """The authors' APGD; of the noise it would draw from here, nothing is left behind."""
    kind = APGDAttack_targeted if loss == "dlr_targeted" else APGDAttack
    attack = kind(
        model,
        n_iter=steps,
        norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm],
        eps=epsilon,
        seed=seed,
        device="cpu",
        use_largereps=norm == "l1",
        **({} if loss == "dlr_targeted" else {"loss": loss}),
    )
    with torch.random.fork_rng([]):
        return attack.perturb(x, y)


@pytest.mark.slow
@norms
@losses
@pytest.mark.filterwarnings("ignore:there are")  # points of zero gradient, which their check finds
def test_at_least_as_strong_as_the_authors_code(
    norm: Norm, loss: str, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """Image by image but for the luck of the random starts."""
    x, y = (part[:100] for part in digit_images)
    steps, epsilon = 40, RADII[norm]
    if loss == "dlr_targeted":
        steps, x, y = 20, x[:40], y[:40]
    theirs = authors(digit_model, x, y, norm, epsilon, loss, steps)
    mine = APGD(loss=loss, steps=steps)(digit_model, x, y, threat(norm, epsilon))
    left, left_mine = (predict(digit_model, x_adv) == y for x_adv in (theirs, mine))
    assert 0.1 < float(left_mine.double().mean()) < 0.9
    assert int(left_mine.sum()) <= int(left.sum()) + 1
    assert int((left_mine & ~left).sum()) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "epsilon", "loss"),
    [("linf", 0.3, "ce"), ("l2", 1.8, "ce"), ("l1", 8, "ce"), ("linf", 0.3, "dlr_targeted")],
)
@pytest.mark.filterwarnings("ignore:there are")
def test_at_least_as_strong_on_a_robust_network(
    norm: Norm,
    epsilon: float,
    loss: str,
    robust_digit_model: nn.Module,
    digit_images: tuple[Tensor, Tensor],
) -> None:
    count = 60 if loss == "dlr_targeted" else 150
    x, y = (part[:count] for part in digit_images)
    model = robust_digit_model
    left, left_mine = 0.0, 0.0
    for seed in (0,) if loss == "dlr_targeted" else (0, 1):
        left += accuracy(model, authors(model, x, y, norm, epsilon, loss, 100, seed=seed), y)
        attack = APGD(loss=loss, seed=seed)
        left_mine += accuracy(model, attack(model, x, y, threat(norm, epsilon)), y)
    # The starts differ: the mean of two such runs scatters by 0.7 points, that of their difference
    # by one.
    assert left_mine <= left + 2 * 0.02


@pytest.mark.slow
def test_at_least_as_strong_as_plain_descent(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:100] for part in digit_images)
    for norm, epsilon in RADII.items():
        plain, auto = (
            accuracy(digit_model, attack(digit_model, x, y, threat(norm, epsilon)), y)
            for attack in (PGD(steps=30), APGD(steps=30))
        )
        assert auto <= plain + 0.01


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "attack.steps=0"),
        ({"targets": 0}, "attack.targets=0"),
        ({"restarts": 1.5}, "attack.restarts=1.5"),
        ({"eot_samples": -1}, "attack.eot_samples=-1"),
        ({"loss": "cw"}, "attack.loss=cw is unknown; expected one of ce, dlr, dlr_targeted"),
        ({"rho": 0}, "attack.rho=0"),
        ({"rho": float("nan")}, "attack.rho=nan"),
        ({"restarts": 2, "random_start": False}, "attack.random_start=true"),
        ({"restarts": None, "random_start": False}, "attack.random_start=true"),
        ({"loss": "dlr_targeted", "target": 1}, "attack.loss=ce"),
        ({"target": "farthest"}, "attack.target=farthest"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        APGD(**wrong)  # type: ignore[arg-type]

"""Attacks against victims whose exact worst case is known, and projections against a solver."""

import numpy as np
import pytest
import torch
from conftest import LinearVictim, LogSoftmax, NoisyLogits
from numpy.typing import NDArray
from torch import Tensor, nn

from robustbench_local.attacks import PGD
from robustbench_local.gradients import Loss, input_gradient
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

Array = NDArray[np.float64]

SHAPES = [(1, 8, 8), (3, 6, 6), (1, 28, 28)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
norms = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])

ROUNDING = 1e-4
"""Margins smaller than this are decided by float32 pixels; typical margins are above 1."""


def images(shape: tuple[int, int, int], count: int = 160, seed: int = 0) -> Tensor:
    """A third of the pixels exactly 0, a third exactly 1: where projections go wrong."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.rand(count, *shape, generator=generator) - 1).clamp_(0, 1)


def rise(slope: Array, x: Array, norm: Norm, epsilon: float) -> Array:
    """How far the linear function `slope @ x` can rise inside ball and box: the exact optimum.

    `slope` (D,), `x` (N, D), float64 (N,). linf: each pixel alone. l1: a fractional knapsack, so
    the steepest pixels are filled first. l2: clip(t * slope, room) for the t that spends epsilon.
    """
    room = np.where(slope > 0, 1 - x, x)
    steep = np.abs(slope)
    if norm == "linf":
        return np.minimum(room, epsilon) @ steep
    if norm == "l1":
        order = np.argsort(-steep)
        filled = np.minimum(np.cumsum(room[:, order], axis=1), epsilon)
        return np.diff(filled, axis=1, prepend=0) @ steep[order]
    low, high = np.zeros((len(x), 1)), np.full((len(x), 1), 1e6)
    for _ in range(100):
        middle = (low + high) / 2
        inside = np.linalg.norm(np.minimum(middle * steep, room), axis=1, keepdims=True) <= epsilon
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.minimum(low * steep, room) @ steep


def margins(model: LinearVictim, x: Tensor, y: Tensor, norm: Norm, epsilon: float) -> Array:
    """The exact worst true-minus-wrong score of every wrong class, shape (N, K-1)."""
    flat = x.flatten(1).double().numpy()
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    worst = np.empty((len(x), len(bias) - 1))
    for true in range(len(bias)):
        rows = y.numpy() == true
        for place, wrong in enumerate(k for k in range(len(bias)) if k != true):
            slope = weight[wrong] - weight[true]
            now = flat[rows] @ slope + bias[wrong] - bias[true]
            worst[rows, place] = -now - rise(slope, flat[rows], norm, epsilon)
    return worst


def victim(shape: tuple[int, int, int], classes: int) -> LinearVictim:
    """Random weights, and a bias that takes the mean image's logits away."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(classes, int(np.prod(shape)), generator=generator)
    return LinearVictim(weight, -weight.sum(1) / 2)


def middling_epsilon(model: LinearVictim, x: Tensor, y: Tensor, norm: Norm) -> float:
    """The radius at which half of the images can be turned."""
    low, high = 0.0, 1.0 if norm == "linf" else 100.0
    for _ in range(30):
        middle = (low + high) / 2
        if np.median(margins(model, x, y, norm, middle).min(1)) > 0:
            low = middle
        else:
            high = middle
    return high


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@norms
@shapes
@pytest.mark.parametrize(
    ("loss", "early_stop"),
    [("ce", True), ("margin", True), pytest.param("ce", False, marks=pytest.mark.slow)],
)
def test_pgd_breaks_exactly_what_can_be_broken(
    shape: tuple[int, int, int], norm: Norm, loss: Loss, early_stop: bool
) -> None:
    model, x = victim(shape, 2), images(shape)
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm)
    breakable = margins(model, x, y, norm, 0.99 * epsilon)[:, 0] < -ROUNDING
    safe = margins(model, x, y, norm, epsilon)[:, 0] > ROUNDING
    assert breakable.mean() > 0.4
    assert safe.mean() > 0.4

    attack = PGD(steps=100, loss=loss, early_stop=early_stop)
    x_adv = attack(model, x, y, ThreatModel(norm=norm, epsilon=epsilon))

    broken = (predict(model, x_adv) != y).numpy()
    assert not (broken & safe).any()
    missed = np.flatnonzero(breakable & ~broken)
    assert len(missed) == 0, f"{len(missed)} of {breakable.sum()} missed, the first is {missed[0]}"


@norms
@shapes
def test_default_pgd_climbs_nearly_to_the_optimum(shape: tuple[int, int, int], norm: Norm) -> None:
    """40 steps reach 98% of the largest possible rise on each image."""
    model, x = victim(shape, 2), images(shape)
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm)
    before = margins(model, x, y, norm, 0)[:, 0]
    possible = before - margins(model, x, y, norm, epsilon)[:, 0]

    x_adv = PGD(early_stop=False)(model, x, y, ThreatModel(norm=norm, epsilon=epsilon))

    reached = before - margins(model, x_adv, y, norm, 0)[:, 0]
    assert (reached <= possible + ROUNDING).all()
    assert (reached / possible).min() >= 0.98


@pytest.mark.slow
@norms
@pytest.mark.parametrize(
    ("loss", "variant"),
    [
        *[(loss, v) for loss in ("ce", "margin") for v in ("shift", "scale up", "log-softmax")],
        # Small logits weigh all wrong classes alike: that is cross-entropy's own weakness.
        ("margin", "scale down"),
        ("dlr", "scale down"),
    ],
)
def test_no_disguise_of_the_logits_helps(norm: Norm, loss: Loss, variant: str) -> None:
    plain, x = victim((1, 8, 8), 5), images((1, 8, 8), 100)
    y = predict(plain, x)
    threat = ThreatModel(norm=norm, epsilon=middling_epsilon(plain, x, y, norm))
    disguised = {
        "shift": LinearVictim(plain.weight.data, plain.bias.data, shift=-50),
        "scale up": LinearVictim(plain.weight.data, plain.bias.data, scale=1e4),
        "scale down": LinearVictim(plain.weight.data, plain.bias.data, scale=1e-4),
        "log-softmax": LogSoftmax(plain),
    }[variant]
    attack = PGD(loss=loss, random_start=False)
    survivors, survivors_disguised = (
        float((predict(plain, attack(model, x, y, threat)) == y).double().mean())
        for model in (plain, disguised)
    )
    assert survivors_disguised <= survivors + 0.01 + 1e-9


@norms
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("classes", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_robustness_claimed_against_many_classes(norm: Norm, loss: Loss, classes: int) -> None:
    model, x = victim((1, 8, 8), classes), images((1, 8, 8), 300)
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm)
    exact = float((margins(model, x, y, norm, epsilon).min(1) > 0).mean())

    attack = PGD(steps=60, loss=loss)
    x_adv = attack(model, x, y, ThreatModel(norm=norm, epsilon=epsilon))

    claimed = float((predict(model, x_adv) == y).double().mean())
    # Cross-entropy climbs towards all wrong classes at once, the others towards the nearest.
    assert exact <= claimed <= exact + (0.03 if loss == "ce" and classes > 3 else 0.01)


def nearest(wanted: Array, x: Array, norm: Norm, epsilon: float) -> Array:
    """The projection by bisection on the multiplier of the ball, float64."""
    if norm == "linf":
        return np.clip(np.clip(wanted, x - epsilon, x + epsilon), 0, 1)
    delta = wanted - x

    def shrunk(multiplier: Array) -> Array:
        if norm == "l2":
            return np.clip(x + delta / (1 + multiplier), 0, 1) - x
        soft = np.sign(delta) * np.maximum(np.abs(delta) - multiplier, 0)
        return np.clip(x + soft, 0, 1) - x

    def length(part: Array) -> Array:
        return np.linalg.norm(part, ord=int(norm[1]), axis=1, keepdims=True)

    low, high = np.zeros((len(x), 1)), np.full((len(x), 1), 1e5)
    for _ in range(100):
        middle = (low + high) / 2
        outside = length(shrunk(middle)) > epsilon
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    fits = length(shrunk(np.zeros((len(x), 1)))) <= epsilon
    return x + shrunk(np.where(fits, 0, high))


@norms
@shapes
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projections_agree_with_a_solver(
    shape: tuple[int, int, int], norm: Norm, spread: float, dtype: torch.dtype
) -> None:
    x = images(shape, 50).to(dtype)
    generator = torch.Generator().manual_seed(3)
    wanted = x + spread * torch.randn(x.shape, generator=generator, dtype=dtype)
    threat = ThreatModel(norm=norm, epsilon={"linf": 0.2, "l2": 1.3, "l1": 7}[norm])

    projected = threat.project(wanted, x)

    flat = [part.flatten(1).double().numpy() for part in (wanted, x)]
    expected = nearest(*flat, norm, threat.epsilon)
    assert projected.dtype == dtype
    np.testing.assert_allclose(projected.flatten(1).double().numpy(), expected, rtol=0, atol=1e-6)
    threat.check(projected, x)


@norms
def test_projections_use_the_whole_budget(norm: Norm) -> None:
    """Clipping after projecting would leave most of it unused where pixels are at the box."""
    x = images((3, 6, 6), 50)
    wanted = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for epsilon in {"linf": [0.05, 0.3], "l2": [0.1, 3], "l1": [0.5, 20]}[norm]:
        threat = ThreatModel(norm=norm, epsilon=epsilon)
        size = threat.size(threat.project(wanted, x), x)
        assert float(size.min()) >= epsilon * (1 - 2e-6)


def test_the_l0_projection_is_the_nearest_image() -> None:
    """Against all pairs of pixels of 2x3 colour images."""
    x, epsilon = images((3, 2, 3), 40), 2
    wanted = x + 0.7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    projected = ThreatModel(norm="l0", epsilon=epsilon).project(wanted, x)
    best = torch.full((len(x),), torch.inf)
    for first in range(6):
        for second in range(first):
            candidate = x.flatten(2).clone()
            for place in (first, second):
                candidate[:, :, place] = wanted.flatten(2)[:, :, place].clamp(0, 1)
            best = best.minimum((candidate - wanted.flatten(2)).flatten(1).norm(dim=1))
    reached = (projected - wanted).flatten(1).norm(dim=1)
    torch.testing.assert_close(reached, best, rtol=0, atol=1e-6)


class NoisyWeights(nn.Module):
    """A two-class linear victim whose weights are drawn anew on every call."""

    def __init__(self, slope: Tensor, deviation: float) -> None:
        super().__init__()
        self.slope, self.deviation = slope, deviation
        self.images_seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images_seen += len(x)
        weight = self.slope + self.deviation * torch.randn(len(x), len(self.slope))
        score = (x.flatten(1) * weight).sum(1)
        return torch.stack((-score / 2, score / 2), 1)


@pytest.mark.parametrize("samples", [1, 16, 256])
def test_eot_converges_to_the_noiseless_gradient(samples: int) -> None:
    slope = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x, y = images((1, 8, 8), 200), torch.zeros(200, dtype=torch.int64)
    with torch.random.fork_rng([]):
        torch.manual_seed(99)
        look = input_gradient(NoisyWeights(slope, 2), x, y, eot_samples=samples)
    error = (look.gradient.flatten(1) / samples - slope).square().mean().sqrt()
    expected = 2 / samples**0.5
    assert 0.95 * expected <= float(error) <= 1.05 * expected
    deviation = (look.loss - x.flatten(1) @ slope) / x.flatten(1).norm(dim=1)
    assert 0.8 * expected <= float(deviation.square().mean().sqrt()) <= 1.2 * expected


@pytest.mark.parametrize("early_stop", [True, False])
def test_no_early_stop_on_a_lucky_draw(early_stop: bool) -> None:
    """Every image is looked at in every step, although the noise breaks most of them at once."""
    victim = NoisyWeights(torch.ones(64), 20)
    x, y = images((1, 8, 8), 20), torch.ones(20, dtype=torch.int64)
    attack = PGD(steps=10, eot_samples=4, early_stop=early_stop)
    attack(victim, x, y, ThreatModel(norm="linf", epsilon=0.1))
    # The last iterate may be looked at too, to compare restarts.
    assert victim.images_seen in (20 * 4 * 10, 20 * 4 * 11)


@pytest.mark.parametrize("deviation", [3.0, 30.0])
def test_a_lucky_draw_is_not_the_best_iterate(deviation: float) -> None:
    """Under noise on the logits the point returned is still the worst case of the mean logits.

    The gradient is exact in every draw, so after 20 steps under linf every iterate is the optimum,
    and only bookkeeping that believes a lucky early draw can miss it.
    """
    model, x = victim((1, 8, 8), 2), images((1, 8, 8))
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, "linf") / 4
    before = margins(model, x, y, "linf", 0)[:, 0]
    possible = before - margins(model, x, y, "linf", epsilon)[:, 0]
    attack = PGD(eot_samples=5)
    x_adv = attack(NoisyLogits(model, deviation), x, y, ThreatModel(norm="linf", epsilon=epsilon))
    reached = before - margins(model, x_adv, y, "linf", 0)[:, 0]
    assert float((reached / possible).mean()) >= 0.98


def test_restarts_attack_the_survivors_only() -> None:
    """A broken image costs no further pass, and what an earlier start broke stays broken."""
    model, x = victim((1, 8, 8), 10), images((1, 8, 8))
    y = predict(model, x)
    threat = ThreatModel(norm="linf", epsilon=0.8 * middling_epsilon(model, x, y, "linf"))
    broken = [
        predict(model, PGD(steps=5, step_size=0.4, restarts=restarts)(model, x, y, threat)) != y
        for restarts in (1, 2, 4)
    ]
    assert (broken[0] <= broken[1]).all()
    assert (broken[1] <= broken[2]).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("best_iterate", [True, False])
@pytest.mark.parametrize("restarts", [1, 3])
def test_every_image_gets_its_own_result(
    norm: Norm, early_stop: bool, best_iterate: bool, restarts: int
) -> None:
    """Images leave at different steps, with radii of their own; a mix-up would land far outside."""
    model, x = victim((3, 6, 6), 5), images((3, 6, 6), 64)
    y = predict(model, x)
    radii = middling_epsilon(model, x, y, norm) * torch.linspace(0.4, 1.2, len(x))
    attack = PGD(
        steps=7, step_size=0.3, restarts=restarts, early_stop=early_stop, best_iterate=best_iterate
    )
    together = ThreatModel(norm=norm, epsilon=0.1).per_example(radii)
    x_adv = attack(model, x, y, together)
    together.check(x_adv, x)
    assert 5 < int((predict(model, x_adv) != y).sum()) < 59
    few = range(0, len(x), 8)
    alone = [
        attack(model, x[[i]], y[[i]], ThreatModel(norm=norm, epsilon=float(radii[i]))) for i in few
    ]
    torch.testing.assert_close(x_adv[::8], torch.cat(alone), rtol=0, atol=2e-6)


class Ridge(nn.Module):
    """Two classes, most alike where `slope @ pixels` is at `top`: large steps jump over it."""

    def __init__(self, slope: Tensor, top: float) -> None:
        super().__init__()
        self.slope, self.top = slope.double(), top

    def forward(self, x: Tensor) -> Tensor:
        score = -(x.flatten(1).double() @ self.slope - self.top).square() - 1e-3
        return torch.stack((torch.zeros_like(score), score), 1).to(x.dtype)


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_best_iterate_is_returned(early_stop: bool) -> None:
    """Steps of the full radius jump to and fro over a ridge, never low enough to break it."""
    model, x = (
        Ridge(torch.randn(64, generator=torch.Generator().manual_seed(1)), 1),
        images((1, 8, 8)),
    )
    y = torch.zeros(len(x), dtype=torch.int64)
    threat = ThreatModel(norm="linf", epsilon=0.2)

    def reached(steps: int, best_iterate: bool) -> Tensor:
        attack = PGD(
            steps=steps,
            step_size=0.7,
            loss="margin",
            early_stop=early_stop,
            best_iterate=best_iterate,
        )
        with torch.no_grad():
            return model(attack(model, x, y, threat))[:, 1]

    last = torch.stack([reached(steps, False) for steps in range(1, 8)])
    best = reached(7, True)
    # The start itself may be best, so the best may lie above all the iterates that follow it.
    assert (best >= last.amax(0)).all()
    assert float((best > last[-1] + 1e-3).double().mean()) > 0.2


def test_a_gradient_that_is_not_a_number_never_counts_as_robust() -> None:
    """The square root of an exact zero: finite logits, but no gradient."""

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = (x - x.detach()).flatten(1).norm(dim=1) + x.flatten(1).square().sum(1).sqrt()
            root = (score - score.detach()).sqrt() + score
            return torch.stack((root, root - 1), 1)

    x, y = images((1, 8, 8), 10), torch.zeros(10, dtype=torch.int64)
    threat = ThreatModel(norm="linf", epsilon=0.1)
    with pytest.raises((ValueError, RuntimeError), match=r"NaN|not finite"):
        threat.check(PGD(steps=3)(Root(), x, y, threat), x)

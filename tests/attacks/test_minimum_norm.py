"""The smallest perturbation, against victims for which it is known."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LinearVictim, LogSoftmax, NoisyLogits, accuracy
from test_closed_forms import Array, images, predict, rise, victim
from torch import Tensor, nn

from robustbench_local.attacks import CW, DDN, FMN, DeepFool
from robustbench_local.attacks.minimum_norm import MinimumNorm
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

with warnings.catch_warnings():
    # It imports modules of other libraries that announce their end.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import foolbox

SHAPE = (1, 8, 8)

ATTACKS: dict[str, MinimumNorm] = {
    "fmn": FMN(steps=60, sweep=4),
    "ddn": DDN(steps=100),
    "cw": CW(steps=250, binary_search_steps=4, initial_const=0.3),
    "deepfool": DeepFool(),
}
pairs = pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name, attack in ATTACKS.items() for norm in sorted(attack.norms - {"l0"})],
)
each = pytest.mark.parametrize("name", list(ATTACKS))


def budget(norm: Norm, epsilon: float = 1) -> ThreatModel:
    return ThreatModel(norm=norm, epsilon=epsilon)


def distances(attack: MinimumNorm, model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> Array:
    """Of what the attack finds; infinite where that is no adversarial example."""
    x_adv = attack.nearest(model, x, y, budget(norm))
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    size = budget(norm).size(x_adv, x)
    return torch.where(predict(model, x_adv) != y, size, torch.inf).numpy()


def exact(model: LinearVictim, x: Tensor, y: Tensor, norm: Norm) -> Array:
    """The distance to the nearest point of the box the victim gets wrong, by bisection."""
    flat = x.flatten(1).double().numpy()
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    nearest = np.full(len(x), np.inf)
    for true in range(len(bias)):
        rows = np.flatnonzero(y.numpy() == true)
        for wrong in (k for k in range(len(bias)) if k != true and len(rows)):
            slope = weight[wrong] - weight[true]
            lack = -(flat[rows] @ slope + bias[wrong] - bias[true])
            low, high = np.zeros((len(rows), 1)), np.full((len(rows), 1), 100.0)
            for _ in range(40):
                middle = (low + high) / 2
                reached = (rise(slope, flat[rows], norm, middle) >= lack)[:, None]
                low, high = np.where(reached, low, middle), np.where(reached, middle, high)
            nearest[rows] = np.minimum(nearest[rows], high[:, 0])
    return nearest


@pairs
@pytest.mark.parametrize("classes", [2, 5])
def test_closed_form_away_from_the_box(name: str, norm: Norm, classes: int) -> None:
    """The distance to a hyperplane: the gap in scores over the dual norm of the slope."""
    weight = torch.randn(classes, 64, generator=torch.Generator().manual_seed(7))
    x = 0.5 + 0.2 * (torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1)) - 0.5)
    # Class 0 leads, so that the nearest boundary is not next to x; nor shall it lie beyond the box,
    # which for l1 means a single pixel.
    bias = -weight.sum(1) / 2
    bias[0] += 1 if norm == "l1" else 5
    model = LinearVictim(weight, bias)
    y = predict(model, x)
    x, y = x[y == 0], y[y == 0]
    scores = model(x).detach().double()
    known = np.full(len(x), np.inf)
    for image in range(len(x)):
        for wrong in set(range(classes)) - {int(y[image])}:
            slope = (weight[wrong] - weight[y[image]]).double()
            gap = scores[image, y[image]] - scores[image, wrong]
            dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
            known[image] = min(known[image], float(gap / slope.norm(p=dual)))
    inside = known < {"linf": 0.3, "l2": 1.2, "l1": 0.39}[norm]
    assert inside.sum() >= 15
    x, y, known = x[inside], y[inside], known[inside]

    found = distances(ATTACKS[name], model, x, y, norm)

    ratio = found / known
    assert (ratio >= 0.999).all()
    if name == "ddn" and classes > 2:
        # The cross-entropy of the paper climbs towards all classes at once, not to the nearest.
        assert np.median(ratio) <= 1.04
        assert ratio.max() <= 1.2
        return
    assert np.median(ratio) <= 1.01
    # Carlini and Wagner's attack follows the class whose score is highest, not the nearest one.
    share = 0.8 if name == "cw" and classes > 2 else 1
    assert (ratio <= 1.01).mean() >= share, np.sort(ratio)[-9:]


@cache
def near_the_box(norm: Norm, classes: int) -> tuple[LinearVictim, Tensor, Tensor, Array]:
    """A victim, images two thirds of whose pixels are 0 or 1, their labels, and the answers."""
    model, x = victim(SHAPE, classes), images(SHAPE, 40)
    y = predict(model, x)
    return model, x, y, exact(model, x, y, norm)


@pytest.mark.slow
@pairs
@pytest.mark.parametrize("classes", [2, 5])
def test_exact_minimum_where_two_thirds_of_the_pixels_are_0_or_1(
    name: str, norm: Norm, classes: int
) -> None:
    model, x, y, known = near_the_box(norm, classes)
    ratio = distances(ATTACKS[name], model, x, y, norm) / known
    assert (ratio >= 0.999).all()
    assert np.median(ratio) <= 1.01, np.median(ratio)
    # These two follow the scores to some class, not to the nearest one.
    share = 0.8 if name in ("cw", "ddn") else 1
    assert (ratio <= 1.05).mean() >= share, np.sort(ratio)[-13:]


def test_fewest_pixels_of_colour_images() -> None:
    """A position counts once, whatever happens to its channels: the exact count is greedy."""
    model, x = victim((3, 6, 6), 2), images((3, 6, 6), 60)
    y = predict(model, x)
    weight, bias = model.weight.detach(), model.bias.detach()
    slope = weight[1 - y] - weight[y]
    lack = -((x.flatten(1) * slope).sum(1) + (bias[1 - y] - bias[y]))
    gain = (torch.where(slope > 0, 1 - x.flatten(1), x.flatten(1)) * slope.abs()).view_as(x).sum(1)
    reached = gain.flatten(1).sort(dim=1, descending=True).values.cumsum(1)
    known = ((reached < lack[:, None]).sum(1) + 1).numpy()

    found = distances(FMN(steps=100), model, x, y, "l0")

    assert (found >= known).all()
    assert (found == known).mean() >= 0.95
    assert (found <= known + 1).all()


@pairs
@pytest.mark.parametrize(
    "variant",
    ["shift", *(pytest.param(v, marks=pytest.mark.slow) for v in ("log-softmax", "scale up"))],
)
def test_no_disguise_of_the_logits_helps(name: str, norm: Norm, variant: str) -> None:
    attack = ATTACKS[name]
    if isinstance(attack, CW) and variant == "scale up":
        # Its constant weighs scores against squared distance, so it has their scale.
        attack = replace(attack, initial_const=attack.initial_const / 1e3)
    plain, x, y, known = near_the_box(norm, 5)
    disguised = {
        "shift": LinearVictim(plain.weight.data, plain.bias.data, shift=-50),
        "scale up": LinearVictim(plain.weight.data, plain.bias.data, scale=1e3),
        "log-softmax": LogSoftmax(plain),
    }[variant]
    # The attack believes the disguised victim, whose rounding is coarser.
    found = distances(attack, disguised, x, y, norm)
    assert np.isfinite(found).all()
    epsilon = np.median(known)
    assert abs((found <= 1.01 * epsilon).mean() - (known <= epsilon).mean()) <= 0.02
    assert np.median(found / known) <= 1.01


@pytest.mark.slow
@each
def test_returned_within_epsilon_or_not_at_all(name: str) -> None:
    model, x = victim(SHAPE, 5), images(SHAPE, 16)
    y = predict(model, x)
    attack, norm = ATTACKS[name], sorted(ATTACKS[name].norms)[-1]
    found = attack.nearest(model, x, y, budget(norm))
    size = budget(norm).size(found, x)
    radii = torch.where(torch.arange(len(x)) % 2 == 0, 1.0001 * size, 0.9999 * size)
    x_adv = attack(model, x, y, budget(norm).per_example(radii))
    assert torch.equal(x_adv[::2], found[::2])
    assert torch.equal(x_adv[1::2], x[1::2])
    # For l0 a whole number, for the others a little more than one of the sizes.
    epsilon = float(size.median()) if norm == "l0" else 1.0001 * float(size.median())
    alone = attack(model, x, y, budget(norm, epsilon))
    assert torch.equal(alone, torch.where((size <= epsilon).view(-1, 1, 1, 1), found, x))


@each
def test_what_is_wrong_already_comes_back_unchanged(name: str) -> None:
    model, x = victim(SHAPE, 5), images(SHAPE, 20)
    y = (predict(model, x) + 1) % 5
    norm = sorted(ATTACKS[name].norms)[-1]
    assert torch.equal(ATTACKS[name].nearest(model, x, y, budget(norm)), x)


@each
def test_where_nothing_can_be_found_the_image_comes_back(name: str) -> None:
    """Class 0 wins whatever the pixels are."""
    weight = torch.zeros(3, 64)
    weight[1] = 1e-3
    model, x = LinearVictim(weight, torch.tensor([1.0, 0, 0])), images(SHAPE, 10)
    norm = sorted(ATTACKS[name].norms)[-1]
    y = torch.zeros(len(x), dtype=torch.int64)
    assert torch.equal(ATTACKS[name].nearest(model, x, y, budget(norm)), x)


@each
def test_targets_are_reached(name: str) -> None:
    model, x = victim(SHAPE, 5), images(SHAPE, 16)
    y = predict(model, x)
    norm = sorted(ATTACKS[name].norms)[-1]
    x_adv = replace(ATTACKS[name], target="next").nearest(model, x, y, budget(norm))
    assert (predict(model, x_adv) == (y + 1) % 5).all()
    free = ATTACKS[name].nearest(model, x, y, budget(norm))
    longer = budget(norm).size(x_adv, x) / budget(norm).size(free, x)
    assert (longer >= 0.999).double().mean() >= 0.9
    assert longer.mean() >= 1.2


@each
def test_a_lucky_draw_is_no_adversarial_example(name: str) -> None:
    """Noise alone turns one look in seven at the start; what comes back is turned nearly always."""
    model, x = victim(SHAPE, 2), images(SHAPE, 20)
    y = predict(model, x)
    gap = model(x).detach().sort(dim=1).values.diff(dim=1).squeeze(1)
    noisy = NoisyLogits(model, float(gap.median()) / 1.5)
    noisy.randomized = True
    norm = sorted(ATTACKS[name].norms)[-1]
    attack = ATTACKS[name]
    if name == "cw":  # else it stops pushing where half of the draws are turned
        attack = CW(
            steps=200, binary_search_steps=2, initial_const=1, boundary_steps=0,
            confidence=2 * noisy.deviation,
        )  # fmt: skip
    x_adv = attack.nearest(noisy, x, y, budget(norm))
    changed = (x_adv != x).flatten(1).any(1)
    assert changed.double().mean() >= 0.3
    assert (predict(model, x_adv) != y)[changed].double().mean() >= 0.9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_plateau_is_left(norm: Norm) -> None:
    """Probabilities that round to exactly 0 and 1 have no gradient anywhere near the image."""

    class Probabilities(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain(x).mul(100).softmax(1)

    plain, x = victim(SHAPE, 2), images(SHAPE, 40)
    y = predict(plain, x)
    found = distances(FMN(steps=200), Probabilities(), x, y, norm)
    assert np.isfinite(found).mean() >= 0.5


def test_restarts_and_the_sweep_only_shorten(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:40] for part in digit_images)
    sizes = [
        budget("l2").size(attack.nearest(digit_model, x, y, budget("l2")), x)
        for attack in (FMN(steps=30), FMN(steps=30, restarts=2), FMN(steps=30, sweep=3))
    ]
    for more in sizes[1:]:
        assert (more <= sizes[0] * 1.002).all()
        assert (more < 0.99 * sizes[0]).any()


def test_random_starts_find_the_same(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:40] for part in digit_images)
    clean, random = (
        distances(FMN(steps=60, random_start=start), digit_model, x, y, "linf")
        for start in (False, True)
    )
    assert np.isfinite(random).all()
    assert np.median(random) <= 1.25 * np.median(clean)


def test_quantized_results_are_stored_images(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:20] for part in digit_images)
    attack = DDN(steps=40, quantize=True, boundary_steps=0)
    x_adv = attack.nearest(digit_model, x, y, budget("l2"))
    assert (predict(digit_model, x_adv) != y).all()
    assert torch.equal(x_adv, (x_adv * 255).round() / 255)


def test_confidence_is_the_margin_that_is_reached() -> None:
    model, x = victim(SHAPE, 3), images(SHAPE, 40)
    y = predict(model, x)
    attack = CW(steps=200, binary_search_steps=5, confidence=2, boundary_steps=0)
    x_adv = attack.nearest(model, x, y, budget("l2"))
    scores = model(x_adv).detach()
    others = scores.scatter(1, y[:, None], -torch.inf).amax(1)
    margin = others - scores.gather(1, y[:, None]).squeeze(1)
    assert (margin[predict(model, x_adv) != y] >= 2).all()
    assert (margin >= 2).double().mean() >= 0.9
    assert margin.median() <= 2.5


@pytest.mark.parametrize(
    ("name", "norm", "epsilon"),
    [("fmn", "linf", 0.3), ("fmn", "l2", 3.5), ("ddn", "l2", 3.5), ("deepfool", "linf", 0.3)],
)
def test_an_undefended_network_is_broken(
    name: str,
    norm: Norm,
    epsilon: float,
    digit_model: nn.Module,
    digit_images: tuple[Tensor, Tensor],
) -> None:
    x, y = (part[:100] for part in digit_images)
    attack = {"fmn": FMN(steps=30), "ddn": DDN(steps=30), "deepfool": DeepFool()}[name]
    x_adv = attack(digit_model, x, y, budget(norm, epsilon))
    budget(norm, epsilon).check(x_adv, x)
    assert accuracy(digit_model, x_adv, y) <= 0.01


FOOLBOX: dict[str, tuple[MinimumNorm, Norm, Callable[[], Any]]] = {
    "fmn-linf": (FMN(steps=60), "linf", lambda: foolbox.attacks.LInfFMNAttack(steps=60)),
    "fmn-l2": (FMN(steps=60), "l2", lambda: foolbox.attacks.L2FMNAttack(steps=60)),
    "fmn-l1": (FMN(steps=60), "l1", lambda: foolbox.attacks.L1FMNAttack(steps=60)),
    "fmn-l0": (FMN(steps=60), "l0", lambda: foolbox.attacks.L0FMNAttack(steps=60)),
    "ddn": (DDN(steps=60), "l2", lambda: foolbox.attacks.DDNAttack(steps=60)),
    "deepfool-l2": (DeepFool(), "l2", lambda: foolbox.attacks.L2DeepFoolAttack()),
    "deepfool-linf": (DeepFool(), "linf", lambda: foolbox.attacks.LinfDeepFoolAttack()),
    "cw": (
        CW(steps=300, binary_search_steps=5, initial_const=0.1), "l2",
        lambda: foolbox.attacks.L2CarliniWagnerAttack(
            steps=300, binary_search_steps=5, initial_const=0.1
        ),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", FOOLBOX)
def test_median_distances_are_no_longer_than_foolbox_finds(
    case: str, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """At equal steps, on the same images; within 3%."""
    attack, norm, theirs = FOOLBOX[case]
    x, y = digit_images
    right = predict(digit_model, x) == y
    x, y = x[right][:40], y[right][:40]
    wrapped = foolbox.PyTorchModel(digit_model, bounds=(0, 1), device="cpu")
    with torch.random.fork_rng([]):
        x_theirs = theirs().run(wrapped, x, foolbox.criteria.Misclassification(y))
    size = budget(norm).size(x_theirs, x)
    known = torch.where(predict(digit_model, x_theirs) != y, size, torch.inf).numpy()
    found = distances(attack, digit_model, x, y, norm)
    assert np.isfinite(found).all()
    assert np.median(found) <= 1.03 * np.median(known)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_steps_that_follow_the_radius_pay_on_a_robust_network(
    norm: Norm, robust_digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """The deviation from the paper is there for a reason: Foolbox has the paper's steps."""
    x, y = digit_images
    right = predict(robust_digit_model, x) == y
    x, y = x[right][:40], y[right][:40]
    wrapped = foolbox.PyTorchModel(robust_digit_model, bounds=(0, 1), device="cpu")
    theirs = {
        "linf": foolbox.attacks.LInfFMNAttack,
        "l2": foolbox.attacks.L2FMNAttack,
        "l1": foolbox.attacks.L1FMNAttack,
        "l0": foolbox.attacks.L0FMNAttack,
    }[norm](steps=60)
    x_theirs = theirs.run(wrapped, x, foolbox.criteria.Misclassification(y))
    size = budget(norm).size(x_theirs, x)
    known = torch.where(predict(robust_digit_model, x_theirs) != y, size, torch.inf).numpy()
    found = distances(FMN(steps=60), robust_digit_model, x, y, norm)
    assert np.median(found) <= 0.9 * np.median(known)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (FMN, {"steps": 0}),
        (FMN, {"restarts": 0}),
        (FMN, {"sweep": -1}),
        (FMN, {"gamma": 1.0}),
        (FMN, {"step_size": 0.0}),
        (FMN, {"boundary_steps": -1}),
        (DDN, {"initial_norm": float("nan")}),
        (DDN, {"quantize": True}),
        (CW, {"initial_const": 0.0}),
        (CW, {"binary_search_steps": 0}),
        (CW, {"confidence": -1.0}),
        (CW, {"confidence": 1.0}),
        (DeepFool, {"candidates": 0}),
        (DeepFool, {"overshoot": 0.0}),
        (DeepFool, {"target": "nearest"}),
    ],
)
def test_bad_hyper_parameters_are_refused(kind: type[MinimumNorm], wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"attack\."):
        kind(**wrong)

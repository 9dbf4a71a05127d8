"""Attacks on victims that may reject images: only accepted and wrong is a success."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from conftest import LinearVictim
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, linprog, minimize
from torch import Tensor, nn

import robustbench_local.attacks as families
from robustbench_local import spatial
from robustbench_local.attacks import (
    APGD,
    ART,
    CW,
    DDN,
    FMN,
    PGD,
    Attack,
    AutoAttack,
    Cascade,
    DeepFool,
    Momentum,
    Noise,
    OnePixel,
    OnePixelExhaustive,
    SparseL1Descent,
    Spatial,
    Square,
    Substitute,
    TorchAttacks,
    Transfer,
)
from robustbench_local.attacks.imitation import stratified
from robustbench_local.attacks.target import choose_targets
from robustbench_local.attacks.transfer import Source
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.gradients import (
    attack_loss,
    input_gradient,
    is_correct,
    pristine,
    resists,
    targeted_dlr,
)
from robustbench_local.models import MLP
from robustbench_local.oracle import Oracle
from robustbench_local.randomness import derive_seed
from robustbench_local.rejection import abstains, class_scores, facing, folded, rejected
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

PIXELS = 16
CLOSE = 0.02
"""Linear programs whose optimum is nearer to 0 than this are left out of what must be found."""


class Rejecting(nn.Module):
    """A linear classifier that rejects images whose linear score is above a threshold.

    In float64 inside, so that rounding decides nothing.
    """

    abstains = True

    def __init__(self, linear: LinearVictim, slope: Tensor, threshold: float) -> None:
        super().__init__()
        self.linear = linear
        self.slope = slope
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x.double())
        excess = x.double().flatten(1) @ self.slope - self.threshold
        return torch.cat((logits, (logits.amax(1) + excess)[:, None]), 1).to(x.dtype)


class WithColumn(nn.Module):
    """A classifier with a rejection that never happens."""

    abstains = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return torch.cat((logits, torch.full_like(logits[:, :1], -1e9)), 1)


@dataclass(frozen=True)
class Case:
    victim: Rejecting
    x: Tensor
    y: Tensor


@cache
def case(classes: int, *, seed: int = 0, steepness: float = 1.5) -> Case:
    """Images that are accepted and right; half of all images are rejected."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, PIXELS, generator=generator, dtype=torch.float64)
    slope = torch.randn(PIXELS, generator=generator, dtype=torch.float64) * steepness
    x = (3 * torch.rand(80, 1, 4, 4, generator=generator) - 1).clamp(0, 1)
    linear = LinearVictim(weight, -weight.sum(1) / 2)
    scores = x.double().flatten(1) @ slope
    victim = Rejecting(linear, slope, float(scores.median()))
    y = linear(x).argmax(1)
    keep = victim(x).argmax(1) == y
    assert len(x) / 3 < keep.sum() < len(x)
    return Case(victim, x[keep], y[keep])


def exact(case: Case, epsilon: float, wanted: int | None = None) -> NDArray[np.float64]:
    """How far each image can be broken under linf, above 0 where it can at all: linear programs.

    The most that a wrong class's lead over the true one, or if `wanted` that class's lead over all
    others, and the distance below the threshold can be at the same time.
    """
    weight, bias = (
        part.detach().numpy() for part in (case.victim.linear.weight, case.victim.linear.bias)
    )
    slope, threshold = case.victim.slope.numpy(), case.victim.threshold
    best = np.full(len(case.x), -np.inf)
    for place, (pixels, true) in enumerate(
        zip(case.x.flatten(1).double().numpy(), case.y.tolist(), strict=True)
    ):
        bounds = [*zip(np.maximum(pixels - epsilon, 0), np.minimum(pixels + epsilon, 1),
                       strict=True), (None, None)]  # fmt: skip
        for wrong in range(len(bias)):
            if wrong == true or wanted not in (None, wrong):
                continue
            beaten = [true] if wanted is None else [k for k in range(len(bias)) if k != wrong]
            rows = [np.append(weight[k] - weight[wrong], 1) for k in beaten]
            limits = [bias[wrong] - bias[k] for k in beaten]
            found = linprog(
                np.append(np.zeros(PIXELS), -1),
                A_ub=[*rows, np.append(slope, 1)],
                b_ub=[*limits, threshold],
                bounds=bounds,
            )
            assert found.status == 0
            best[place] = max(best[place], -found.fun)
    return best


GRADIENT: dict[str, Attack] = {
    "pgd": PGD(steps=100, step_size=0.05),
    "pgd margin": PGD(steps=100, step_size=0.05, loss="margin"),
    "apgd": APGD(steps=100),
    "apgd dlr": APGD(steps=100, loss="dlr"),
    "apgd dlr targeted": APGD(steps=100, loss="dlr_targeted"),
    "fmn": FMN(steps=300),
    "deepfool": DeepFool(steps=100),
    "momentum": Momentum(steps=100, step_size=0.05),
    "square": Square(queries=3000),
    "cascade": Cascade(parts={"noise": Noise(samples=2), "apgd": APGD(steps=100)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize(("classes", "epsilon"), [(2, 0.1), (2, 0.2), (4, 0.1)])
def test_what_can_be_broken_while_accepted_is_broken_and_nothing_else(
    name: str, classes: int, epsilon: float
) -> None:
    given = case(classes)
    optimum = exact(given, epsilon)
    assert 5 < (optimum > CLOSE).sum() < len(optimum) - 5
    x_adv = GRADIENT[name](given.victim, given.x, given.y, linf(epsilon))
    broken = accepted_and_wrong(given, x_adv)
    assert not (broken & (optimum < 0)).any()
    assert broken[optimum > CLOSE].all()


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=200, step_size=0.02, target=1),
        APGD(steps=100, target=1),
        APGD(steps=100, loss="dlr", target=1),
        FMN(steps=300, target=1),
        DeepFool(steps=100, target=1),
    ],
    ids=str,
)
def test_a_target_is_reached_only_where_it_is_accepted(attack: Attack) -> None:
    given = case(4)
    others = given.y != 1
    given = Case(given.victim, given.x[others], given.y[others])
    optimum = exact(given, 0.15, wanted=1)
    assert 3 < (optimum > CLOSE).sum() < len(optimum) - 3
    x_adv = attack(given.victim, given.x, given.y, linf(0.15))
    reached = (given.victim(x_adv).argmax(1) == 1).numpy()
    assert not (reached & (optimum < 0)).any()
    assert reached[optimum > CLOSE].mean() >= 0.9


def nearest(case: Case, norm: Norm) -> NDArray[np.float64]:
    """The size of the smallest perturbation that is accepted and wrong, of two classes: a solver's.

    l1: a linear program over the changes upwards and downwards. l2: sequential least squares.
    """
    weight, bias = (
        part.detach().numpy() for part in (case.victim.linear.weight, case.victim.linear.bias)
    )
    slope, threshold = case.victim.slope.numpy(), case.victim.threshold
    sizes = []
    for pixels, true in zip(case.x.flatten(1).double().numpy(), case.y.tolist(), strict=True):
        lead = weight[1 - true] - weight[true]
        missing = -(lead @ pixels + bias[1 - true] - bias[true])
        room = threshold - slope @ pixels
        if norm == "l1":
            found = linprog(
                np.ones(2 * PIXELS),
                A_ub=[np.concatenate((-lead, lead)), np.concatenate((slope, -slope))],
                b_ub=[-missing, room],
                bounds=[(0, 1 - p) for p in pixels] + [(0, p) for p in pixels],
            )
            sizes.append(found.fun if found.status == 0 else np.inf)
        else:
            found = minimize(
                lambda delta: delta @ delta,
                np.zeros(PIXELS),
                jac=lambda delta: 2 * delta,
                bounds=[*zip(-pixels, 1 - pixels, strict=True)],
                constraints=LinearConstraint(
                    np.stack((lead, slope)), [missing, -np.inf], [np.inf, room]
                ),
                method="SLSQP",
                options={"maxiter": 500},
            )
            sizes.append(found.fun**0.5 if found.success else np.inf)
    return np.array(sizes)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "attack"), [
    ("l2", CW(steps=400, step_size=0.05, binary_search_steps=6, initial_const=1)),
    ("l2", DDN(steps=300)),
    ("l2", FMN(steps=300)),
    ("l2", DeepFool(steps=100)),
    ("l1", FMN(steps=300)),
    ("l1", APGD(steps=100)),
    ("l1", SparseL1Descent(steps=200, step_size=0.03)),
    ("l2", PGD(steps=100, step_size=0.05)),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)  # fmt: skip
def test_the_smallest_perturbations_that_are_accepted(norm: Norm, attack: Attack) -> None:
    given = case(2, seed=1, steepness=4)
    optimum = nearest(given, norm)
    epsilon = float(np.median(optimum))
    x_adv = attack(given.victim, given.x, given.y, ThreatModel(norm=norm, epsilon=epsilon))
    broken = accepted_and_wrong(given, x_adv)
    assert not (broken & (optimum > 1.001 * epsilon)).any()
    assert broken[optimum < 0.8 * epsilon].all()


def test_an_evolved_pixel_goes_on_until_it_is_accepted() -> None:
    given, threat = case(3, seed=1, steepness=4), ThreatModel(norm="l0", epsilon=2)
    attack = OnePixel(population=40, generations=30)
    careless = attack(given.victim.linear, given.x, given.y, threat)
    found = attack(given.victim, given.x, given.y, threat)
    assert accepted_and_wrong(given, found).sum() >= accepted_and_wrong(given, careless).sum() + 5


def test_noise_is_drawn_until_it_is_accepted() -> None:
    class ClassOfItsOwn(nn.Module):
        """Rejection as a class like any other: its images are given up as broken."""

        def forward(self, x: Tensor) -> Tensor:
            return given.victim(x)

    given, attack = case(4, seed=6, steepness=4), Noise(samples=20)
    careless = attack(ClassOfItsOwn(), given.x, given.y, linf(0.3))
    found = attack(given.victim, given.x, given.y, linf(0.3))
    assert accepted_and_wrong(given, found).sum() >= accepted_and_wrong(given, careless).sum() + 5


def test_one_pixel_by_brute_force() -> None:
    given = case(4)
    x_adv = OnePixelExhaustive(levels=2)(
        given.victim, given.x, given.y, ThreatModel(norm="l0", epsilon=1)
    )
    possible = np.zeros(len(given.x), bool)
    for place, level in product(range(PIXELS), (0.0, 1.0)):
        changed = given.x.flatten(1).clone()
        changed[:, place] = level
        possible |= accepted_and_wrong(given, changed.view_as(given.x))
    assert 0 < possible.sum() < len(possible)
    assert (accepted_and_wrong(given, x_adv) == possible).all()


def test_rotations_by_brute_force() -> None:
    given = case(4, seed=6, steepness=4)
    threat = ThreatModel(norm="spatial", epsilon=1, access="labels")
    possible = np.zeros(len(given.x), bool)
    careless = np.zeros(len(given.x), bool)  # ends with the first that is not the true class
    ended = np.zeros(len(given.x), bool)
    for transform in spatial.grid(1):
        moved = spatial.apply(given.x, transform)
        broken = accepted_and_wrong(given, moved)
        careless |= broken & ~ended
        ended |= (given.victim(moved).argmax(1) != given.y).numpy()
        possible |= broken
    assert careless.sum() < possible.sum() < len(possible)
    x_adv = Spatial()(given.victim, given.x, given.y, threat)
    assert (accepted_and_wrong(given, x_adv) == possible).all()


ALIKE: dict[str, tuple[Norm, Attack]] = {
    "pgd": ("linf", PGD(steps=10)),
    "pgd margin": ("l2", PGD(steps=10, loss="margin")),
    "pgd dlr": ("linf", PGD(steps=10, loss="dlr")),
    "pgd target": ("linf", PGD(steps=10, target="random")),
    "apgd": ("l1", APGD(steps=20)),
    "apgd dlr": ("linf", APGD(steps=20, loss="dlr", target="least_likely")),
    "apgd dlr targeted": ("linf", APGD(steps=20, loss="dlr_targeted")),
    "ddn": ("l2", DDN(steps=20)),
    "cw": ("l2", CW(steps=20, binary_search_steps=2)),
    "fmn": ("linf", FMN(steps=20, sweep=9)),
    "deepfool": ("linf", DeepFool(steps=10)),
    "square": ("linf", Square(queries=50)),
    "one pixel": ("l0", OnePixel(population=10, generations=5)),
    "spatial": ("spatial", Spatial()),
    "noise": ("linf", Noise()),
    "momentum": ("linf", Momentum(steps=5)),
    "cascade": ("linf", Cascade(parts={"apgd": APGD(steps=5), "square": Square(queries=20)})),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_rejection_that_never_happens_changes_no_bit(name: str) -> None:
    norm, attack = ALIKE[name]
    given = case(4)
    x, y = given.x, given.y
    threat = ThreatModel(norm=norm, epsilon={"linf": 0.1, "l2": 0.4, "l1": 1, "l0": 1,
                                             "spatial": 0.5}[norm])  # fmt: skip
    plain, other = (
        Oracle(victim, threat, 4)
        for victim in (given.victim.linear, WithColumn(given.victim.linear))
    )
    found = attack(plain, x, y, threat)
    assert not torch.equal(found, x)
    assert torch.equal(attack(other, x, y, threat), found)
    # Nor what it costs: rejection is no class that anything is spent on.
    assert (other.forward_passes, other.backward_passes) == (
        plain.forward_passes,
        plain.backward_passes,
    )


class Fixed(nn.Module):
    """Says whatever it is told to."""

    def __init__(self, logits: Tensor, *, abstains: bool) -> None:
        super().__init__()
        self.logits = logits
        self.abstains = abstains

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


LOGITS = torch.randn(500, 5, generator=torch.Generator().manual_seed(1)).round(decimals=1)
TRUE = torch.arange(500) % 4
"""Ties are frequent."""


def test_folded_logits_resist_exactly_where_the_victim_does() -> None:
    answer = LOGITS.argmax(1)
    holds = (answer == TRUE) | (answer == 4)
    with facing(Fixed(LOGITS, abstains=True)):
        assert torch.equal(resists(LOGITS, TRUE), holds)
        assert torch.equal(rejected(LOGITS), answer == 4)
        assert torch.equal(resists(LOGITS, TRUE, targeted=True), answer != TRUE)
        plain = folded(LOGITS, TRUE)
        assert plain.shape == (500, 4) and class_scores(LOGITS).shape == (500, 4)
        # Up to ties, the true class of the folded logits is the largest where the victim resists.
        lead = attack_loss(LOGITS, TRUE, "margin")
        assert (lead[~holds] >= 0).all() and (lead[holds] <= 0).all()
        towards = attack_loss(LOGITS, TRUE, "margin", targeted=True)
        assert (towards[answer == TRUE] >= 0).all() and (towards[answer != TRUE] <= 0).all()
    assert torch.equal(is_correct(LOGITS, TRUE), answer == TRUE)


def test_the_log_odds_are_those_of_being_accepted_and_wrong() -> None:
    share = LOGITS.double().softmax(1)
    wrong = share[:, :4].scatter(1, TRUE[:, None], 0).sum(1)
    with facing(Fixed(LOGITS, abstains=True)):
        loss = attack_loss(LOGITS.double(), TRUE, "ce")
    torch.testing.assert_close(loss, (wrong / (1 - wrong)).log())


def test_ratios_are_those_of_the_folded_logits() -> None:
    true = torch.maximum(LOGITS.gather(1, TRUE[:, None]), LOGITS[:, 4:])
    plain = LOGITS[:, :4].scatter(1, TRUE[:, None], true)
    wanted = (TRUE + 1) % 4
    untargeted, targeted = attack_loss(plain, TRUE, "dlr"), targeted_dlr(plain, TRUE, wanted)
    with facing(Fixed(LOGITS, abstains=True)):
        assert torch.equal(attack_loss(LOGITS, TRUE, "dlr"), untargeted)
        assert torch.equal(targeted_dlr(LOGITS, TRUE, wanted), targeted)


def test_what_logits_mean_is_as_before_after_an_attack_and_after_an_exception() -> None:
    silent, rejecting = Fixed(LOGITS, abstains=False), Fixed(LOGITS, abstains=True)
    assert abstains(nn.Sequential(rejecting)) and not abstains(nn.Sequential(silent))
    held = []
    with pytest.raises(RuntimeError, match="in the middle"), pristine(rejecting):
        held.append(class_scores(LOGITS).shape[1])
        with pristine(silent):
            held.append(class_scores(LOGITS).shape[1])
        held.append(class_scores(LOGITS).shape[1])
        raise RuntimeError("in the middle")
    assert [*held, class_scores(LOGITS).shape[1]] == [4, 5, 4, 5]


def test_targets_are_classes() -> None:
    least = LOGITS.clone()
    least[:, 4] = -100
    victim = Fixed(least, abstains=True)
    x = torch.rand(500, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with pristine(victim):
        for rule in ("random", "next", "least_likely"):
            wanted = choose_targets(rule, victim, x, TRUE)
            assert int(wanted.max()) == 3 and not (wanted == TRUE).any()
        with pytest.raises(UserError, match=r"attack\.target=4 is out of range"):
            choose_targets(4, victim, x, TRUE)


SERVED = (
    APGD, CW, DDN, FMN, PGD, Cascade, DeepFool, Momentum, Noise, OnePixel, OnePixelExhaustive,
    SparseL1Descent, Spatial, Square, Substitute, Transfer,
)  # fmt: skip
REFUSING: dict[str, Callable[[], Attack]] = {
    "autoattack": AutoAttack,
    "torchattacks": lambda: TorchAttacks(name="PGD"),
    "art": lambda: ART(name="HopSkipJump", kwargs={"max_iter": 1}),
    "cascade": lambda: Cascade(parts={"pgd": PGD(), "their pgd": TorchAttacks(name="PGD")}),
}


def test_every_family_is_known_to_serve_or_to_refuse() -> None:
    known = {cls.__name__ for cls in (*SERVED, AutoAttack, TorchAttacks, ART)}
    assert known == set(families.__all__) - {"Attack"}
    assert all(cls.serves_rejection for cls in SERVED)


@pytest.mark.parametrize("name", REFUSING)
def test_attacks_that_take_a_rejection_for_a_success_refuse(name: str) -> None:
    attack, given = REFUSING[name](), case(4)
    with pytest.raises(UserError, match=r"would count images that the defense rejects as broken; "
                       r"type attack=standard.*awareness=oblivious"):  # fmt: skip
        attack(given.victim, given.x, given.y, linf(0.1))
    with pytest.raises(UserError, match="would count images"):
        attack.require_rejection()
    # The network alone is theirs to attack.
    attack(given.victim.linear, given.x[:1], given.y[:1], linf(0))


def test_the_oracle_answers_with_one_more_entry() -> None:
    given = case(4)
    for access in ("gradients", "scores", "labels"):
        oracle = Oracle(given.victim, ThreatModel(norm="linf", epsilon=0.1, access=access), 4)
        assert (oracle.num_classes, oracle.outputs) == (4, 5)
        assert oracle(given.x).shape == (len(given.x), 5)
        assert torch.equal(oracle(given.x).argmax(1), given.victim(given.x).argmax(1))
    wrong = Oracle(Fixed(LOGITS, abstains=True), linf(0.1), 5)
    with pytest.raises(UserError, match=r"expected logits of shape \(2, 6\)"):
        wrong(given.x[:2])


def test_a_substitute_learns_what_is_rejected() -> None:
    """Rejection is a label like any other: what it makes of images is wrong and accepted there."""
    given = case(2)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (400, 1, 4, 4), generator=generator).to(torch.uint8)
    labels = given.victim.linear(images / 255).argmax(1)
    split = Split(images, labels, torch.arange(400))
    threat = ThreatModel(norm="linf", epsilon=0.2, access="labels")
    attack = Substitute(
        seeds=200, rounds=1, epochs=40, learning_rate=0.01, shift=0, models=(MLP,),
        inner=PGD(steps=20),
    )  # fmt: skip
    oracle = Oracle(given.victim, threat, 2)
    attack = attack.fit(oracle, split, threat)
    model = attack.fitted.model
    assert abstains(model) and model(given.x).shape == (len(given.x), 3)
    assert attack.report(threat)["agreement_with_victim"] > 0.8
    broken = accepted_and_wrong(given, attack(oracle, given.x, given.y, threat))
    assert not (broken & (exact(given, 0.2) < 0)).any()
    # Of the images it was not trained on: what it breaks of itself, and that of the victim's.
    order = stratified(labels, torch.Generator().manual_seed(derive_seed(0, "seeds")))[200:]
    others = Case(given.victim, split.pixels(order), labels[order])
    right = others.victim(others.x).argmax(1) == others.y
    others = Case(given.victim, others.x[right], others.y[right])
    made = attack(oracle, others.x, others.y, threat)
    answer = model(made).argmax(1)
    fooled = ((answer != others.y) & (answer < 2)).numpy()
    rate = accepted_and_wrong(others, made)[fooled].mean()
    assert attack.report(threat)["transfer_rate"] == pytest.approx(rate)
    assert 0 < fooled.sum() < len(fooled) and rate < 1
    assert broken.sum() > 0.4 * (exact(given, 0.2) > 0).sum()


def test_transferred_images_come_from_networks_without_rejection() -> None:
    given = case(4)
    source = Source("seed:1", given.victim.linear, "", "")
    attack = Transfer(sources=("seed:1",), steps=5).with_models([source])
    plain = attack(given.victim.linear, given.x, given.y, linf(0.1))
    assert torch.equal(attack(given.victim, given.x, given.y, linf(0.1)), plain)


def test_the_gradient_is_that_of_the_folded_loss() -> None:
    """By hand where the image is rejected: the margin falls as the score rises."""
    given = case(2)
    far = Case(Rejecting(given.victim.linear, given.victim.slope, -100), given.x, given.y)
    wrong = 1 - far.y
    with pristine(far.victim):
        found = input_gradient(far.victim, far.x, wrong, loss="margin").gradient.flatten(1)
    # The largest class is the only wrong one, and rejection is that plus the excess.
    expected = -given.victim.slope.float().expand(len(found), -1)
    torch.testing.assert_close(found, expected)


def linf(epsilon: float) -> ThreatModel:
    return ThreatModel(norm="linf", epsilon=epsilon)


def accepted_and_wrong(case: Case, x: Tensor) -> NDArray[np.bool_]:
    with torch.no_grad():
        answer = case.victim(x).argmax(1)
    classes = len(case.victim.linear.bias)
    return ((answer != case.y) & (answer < classes)).numpy()

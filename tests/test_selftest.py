"""The selftest knows the truth, passes what is right, and says what is wrong with the rest."""

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize

from robustbench_local.attacks import (
    APGD,
    FMN,
    PGD,
    Attack,
    Cascade,
    Noise,
    OnePixelExhaustive,
    Spatial,
    Square,
    TorchAttacks,
    Transfer,
)
from robustbench_local.errors import UserError
from robustbench_local.evaluation.judge import judge
from robustbench_local.selftest import selftest
from robustbench_local.selftest.__main__ import main, own_attack
from robustbench_local.selftest.cases import cases
from robustbench_local.selftest.images import images_of, linear_victim
from robustbench_local.selftest.optimum import highest, worst_case
from robustbench_local.threat import ThreatModel

LINF = ThreatModel(norm="linf", epsilon=0.3)
BALLS = [
    LINF,
    ThreatModel(norm="l2", epsilon=2.0),
    ThreatModel(norm="l1", epsilon=6.0),
    ThreatModel(norm="l0", epsilon=4),
]
balls = pytest.mark.parametrize("threat", BALLS, ids=lambda threat: threat.norm)


def outcomes(make, threat=LINF):
    """Verdicts by victim; `make` is an attack or makes one for a number of draws."""
    maker = make if not isinstance(make, Attack) else lambda draws: make
    return {outcome.victim: outcome for outcome in selftest(maker, threat)}


def failed(found):
    return {name for name, outcome in found.items() if outcome.verdict == "FAIL"}


FLOOR = {"nearly undecided"}
LINEAR = {
    "linear, 2 classes",
    "linear, 5 classes, 3 channels",
    "pixels at 0 and 1, 3 classes",
    "logits shifted by -50",
    "logits times 1000",
    "some images wrong before",
}
OTHERS = {"rounded pixels, no gradient", "noise on every pixel", "a narrow ridge"}
PROMISES = {"a small network", "the same at epsilon 0", "breaks down at once", "breaks down later"}


@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
def test_the_optimum_is_that_of_a_solver(norm):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.rand(6, 1, 3, 3, generator=generator) - 1).clamp(0, 1)
    slope = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    threat = ThreatModel(norm=norm, epsilon={"linf": 0.3, "l1": 1.1, "l2": 0.7}[norm])
    point = highest(slope, x, threat)
    threat.check(point, x)
    found = (slope * (point - x).flatten(1)).sum(1).numpy()
    for row in range(6):
        low, high = -x[row].flatten().double().numpy(), 1 - x[row].flatten().double().numpy()
        gain = slope[row].numpy()
        if norm == "l2":
            ball = {"type": "ineq", "fun": lambda d: threat.epsilon**2 - d @ d}
            solved = optimize.minimize(
                lambda d, gain=gain: -gain @ d,
                np.zeros(9),
                jac=lambda d, gain=gain: -gain,
                bounds=list(zip(low, high, strict=True)),
                constraints=ball,
                method="SLSQP",
            )
        elif norm == "linf":
            limits = zip(
                np.maximum(low, -threat.epsilon), np.minimum(high, threat.epsilon), strict=True
            )
            solved = optimize.linprog(-gain, bounds=list(limits))
        else:  # up and down apart, their sum within the budget
            solved = optimize.linprog(
                np.concatenate([-gain, gain]),
                A_ub=np.ones((1, 18)),
                b_ub=[threat.epsilon],
                bounds=[*zip(np.zeros(9), high, strict=True), *zip(np.zeros(9), -low, strict=True)],
            )
        assert found[row] == pytest.approx(-solved.fun, abs=1e-5)


def test_the_optimum_of_few_pixels_is_that_of_trying_all():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 2, 2, 2, generator=generator)
    slope = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    point = highest(slope, x, ThreatModel(norm="l0", epsilon=2))
    for row in range(5):
        best = -np.inf
        for places in itertools.combinations(range(4), 2):
            for colours in itertools.product([0.0, 1.0], repeat=4):
                tried = x[row].flatten(1).clone()
                tried[:, list(places)] = torch.tensor(colours).view(2, 2)
                best = max(best, float(slope[row] @ (tried - x[row].flatten(1)).flatten().double()))
        rise = float(slope[row] @ (point[row] - x[row]).flatten().double())
        assert rise == pytest.approx(best, abs=1e-5)


@pytest.mark.slow
@balls
@pytest.mark.parametrize("kind", ["between", "at the edge"])
@pytest.mark.parametrize("classes", [2, 5])
def test_images_are_as_hard_as_they_are_said_to_be(threat, kind, classes):
    """The judge confirms who can be fooled, and a hundred random points that nobody else can."""
    shape = (3, 8, 8)
    victim = linear_victim(shape, classes)
    wanted = torch.tensor([0.3, 0.6, 0.9, 1.1, 1.3], dtype=torch.float64).repeat(2)
    x, y = images_of(victim, shape, threat, wanted, kind)
    found = worst_case(victim, x, y, threat)
    torch.testing.assert_close(found.needed, wanted, rtol=0.02, atol=0)
    assert (victim(x).argmax(1) == y).all()
    fooled = ~judge(victim, found.point, x, y, threat, num_classes=classes).correct.all(1)
    assert torch.equal(fooled, wanted < 1)
    at_the_edge = ((x == 0) | (x == 1)).float().mean()
    assert at_the_edge > 0.5 if kind == "at the edge" else at_the_edge < 0.3
    safe = wanted > 1
    noisy = Noise(samples=100)(victim, x[safe], y[safe], threat)
    assert (victim(noisy).argmax(1) == y[safe]).all()


def test_half_the_optimum_is_half_of_the_way():
    """`needed` is a share of the best perturbation: less of it leaves the image right."""
    victim = linear_victim((1, 8, 8), 2)
    wanted = torch.linspace(0.2, 0.95, 12, dtype=torch.float64)
    x, y = images_of(victim, (1, 8, 8), LINF, wanted, "between")
    point = worst_case(victim, x, y, LINF).point
    for share, right in ((-0.01, True), (0.01, False)):
        part = (wanted + share).view(-1, 1, 1, 1)
        assert ((victim((x + part * (point - x)).float()).argmax(1) == y) == right).all()


SOUND = {
    "fgsm": PGD(steps=1, step_size=1.0, random_start=False, early_stop=False, best_iterate=False),
    "pgd": PGD(),
    "apgd": APGD(steps=40),
    "square": lambda draws: Square(queries=2000 if draws == 1 else 4000, eot_samples=min(draws, 4)),
    "standard": lambda draws: Cascade(
        parts={
            "apgd_ce": APGD(steps=20, eot_samples=draws),
            "apgd_t": APGD(steps=20, loss="dlr_targeted", eot_samples=draws),
            "fmn": FMN(steps=20, eot_samples=draws),
            "square": Square(queries=500, eot_samples=draws),
        },
        skip_if_random=["apgd_t", "fmn", "square"],
        eot_samples=draws,
    ),
    "noise": Noise(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_our_attacks_pass(name):
    found = outcomes(SOUND[name])
    assert set(found) == LINEAR | FLOOR | OTHERS | PROMISES
    passed = {victim for victim, outcome in found.items() if outcome.verdict == "pass"}
    nothing = LINEAR | {"rounded pixels, no gradient", "noise on every pixel"}
    assert passed == set(found) - (nothing if name == "noise" else set())
    assert failed(found) == set()
    assert found["linear, 2 classes"].known == "12 of 16 can be broken"
    broken = "0 broken" if name == "noise" else "12 broken"
    assert found["linear, 2 classes"].reached == broken
    masked = found["rounded pixels, no gradient"]
    if name in ("fgsm", "pgd", "apgd"):
        assert masked.reached == "0 broken"
        assert "the audit says zero_gradient" in masked.why
    elif name != "noise":
        assert masked.reached == "12 broken"


@pytest.mark.slow
@balls
def test_other_norms_pass_too(threat):
    attack = OnePixelExhaustive() if threat.norm == "l0" else PGD(steps=60)
    threat = replace(threat, epsilon=1) if threat.norm == "l0" else threat
    assert failed(outcomes(attack, threat)) == set()


def test_rotations_pass():
    threat = ThreatModel(norm="spatial", epsilon=0.5, access="labels")
    found = outcomes(Spatial(), threat)
    assert failed(found) == set()
    assert found["linear, 2 classes"].why.startswith("all ")


class Idle(Attack):
    """Returns what it was given."""

    needs = "labels"
    norms = frozenset({"linf", "l2", "l1", "l0"})

    def run(self, model, x, y, threat):
        return x


@pytest.mark.parametrize("threat", [BALLS[0], BALLS[3]], ids=["linf", "l0"])
def test_an_attack_that_does_nothing_passes_nowhere_but_where_nothing_is_to_be_done(threat):
    found = outcomes(Idle(), threat)
    assert {name for name, outcome in found.items() if outcome.verdict == "pass"} == PROMISES
    assert "fewer than random noise does: 16" in found["nearly undecided"].why
    if threat.norm == "linf":
        assert failed(found) == FLOOR
        assert found["linear, 2 classes"].why.endswith("and it breaks nothing")


@pytest.mark.parametrize("threat", [BALLS[0], BALLS[3]], ids=["linf", "l0"])
def test_random_noise_is_the_floor(threat):
    found = outcomes(Noise(), threat)
    assert failed(found) == set()
    assert found["nearly undecided"].reached == "16 broken"


@dataclass(frozen=True, kw_only=True)
class Downhill(PGD):
    """Goes the wrong way."""

    def direction(self, threat, gradient, x_adv, stride, *, progress):
        return -super().direction(threat, gradient, x_adv, stride, progress=progress)


@dataclass(frozen=True, kw_only=True)
class TooFar(PGD):
    """Takes a tenth more than it may."""

    def run(self, model, x, y, threat):
        return super().run(model, x, y, replace(threat, epsilon=1.1 * threat.epsilon))


@dataclass(frozen=True, kw_only=True)
class Modest(PGD):
    """Leaves a tenth of the budget unused."""

    def run(self, model, x, y, threat):
        return super().run(model, x, y, replace(threat, epsilon=0.9 * threat.epsilon))


@dataclass(frozen=True, kw_only=True)
class InPlace(PGD):
    """Writes into the images it was given."""

    def run(self, model, x, y, threat):
        x_adv = super().run(model, x, y, threat)
        x.copy_(x_adv)
        return x_adv


@dataclass(frozen=True, kw_only=True)
class HalfTheBatch(PGD):
    """Forgets the second half."""

    def run(self, model, x, y, threat):
        half = len(x) // 2
        found = super().run(model, x[:half], y[:half], threat)
        return torch.cat([found, x[half:]])


@dataclass(frozen=True, kw_only=True)
class ByHand(Attack):
    """A last-iterate PGD of a user's own, with everything that can be wrong with it."""

    needs = "gradients"
    norms = frozenset({"linf"})

    steps: int = 10
    wrong: str = ""

    def __call__(self, model, x, y, threat):
        if self.wrong == "epsilon":
            threat = replace(threat, epsilon=0.3)
        modes = [(module, module.training) for module in model.modules()]
        weights = [(weight, weight.grad) for weight in model.parameters()]
        model.eval()
        try:
            return self.run(model, x, y, threat)
        except RuntimeError:
            if self.wrong != "swallows":
                raise
            return x.clone()
        finally:
            if self.wrong != "modes":
                for module, mode in modes:
                    module.training = mode
            if self.wrong != "gradients":
                for weight, gradient in weights:
                    weight.grad = gradient
            if self.wrong == "torch":
                torch.rand(1)
            if self.wrong == "numpy":
                np.random.rand()
            if self.wrong == "python":
                random.random()

    def run(self, model, x, y, threat):
        x_adv = x.clone()
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(model(x_adv), y)
                if self.wrong == "gradients":
                    loss.backward()
                    gradient = x_adv.grad
                else:
                    (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = threat.project(x_adv.detach() + 0.25 * threat.epsilon * gradient.sign(), x)
        return x_adv + torch.nan if self.wrong == "nan" else x_adv


@dataclass(frozen=True, kw_only=True)
class GlobalDraws(PGD):
    """Starts at a point from torch's global generator: the same for the same batch only."""

    random_start: bool = False

    def run(self, model, x, y, threat):
        start = threat.project(x + threat.epsilon * (2 * torch.rand_like(x) - 1), x)
        found = super().run(model, start, y, replace(threat, epsilon=0.1 * threat.epsilon))
        return threat.project(found, x)


@dataclass(frozen=True, kw_only=True)
class Greedy(PGD):
    """Says it needs labels only, and follows the gradient."""

    needs = "labels"


@dataclass(frozen=True, kw_only=True)
class Peeping(Noise):
    """Says it needs labels only, and looks at scores: of labels alone the largest is always 1."""

    def run(self, model, x, y, threat):
        found = super().run(model, x, y, threat)
        sure = model(found).amax(1) == 1
        return torch.where(sure.view(-1, 1, 1, 1), x, found)


MULTIPLE = LINEAR | {"noise on every pixel"}
NETWORK = {"a small network", "breaks down at once", "breaks down later"}


@pytest.mark.parametrize(
    ("attack", "fails", "why"),
    [
        (Downhill(), MULTIPLE, "misses 12 of the 12"),
        (TooFar(), LINEAR, "exceeds epsilon 0.3"),
        (Modest(), {"linear, 2 classes"}, "misses 4 of the 12"),
        (InPlace(), {"a small network"}, "modifies the images it is given"),
        (HalfTheBatch(), MULTIPLE, "misses 4 of the 12"),
        (GlobalDraws(), {"a small network"}, "depends on the others in the batch"),
        (Greedy(), {"a small network"}, "says needs = 'labels' and needs more: element 0"),
        (Peeping(), {"a small network"}, "and needs more: given that alone it breaks 0 images"),
        (ByHand(), {"a narrow ridge", "logits times 1000"}, "returned another"),
        (ByHand(wrong="modes"), NETWORK, "train/eval flags"),
        (ByHand(wrong="gradients"), {"a small network", "breaks down later"}, "leaves gradients"),
        (ByHand(wrong="torch"), NETWORK, "torch's global generator"),
        (ByHand(wrong="numpy"), NETWORK, "NumPy's global generator"),
        (ByHand(wrong="python"), NETWORK, "Python's global generator"),
        (ByHand(wrong="swallows"), {"breaks down at once", "breaks down later"}, "as if nothing"),
        (ByHand(wrong="epsilon"), {"the same at epsilon 0"}, "although epsilon is 0"),
        (ByHand(wrong="nan"), LINEAR, "NaN"),
    ],
    ids=lambda value: (
        f"{type(value).__name__}{getattr(value, 'wrong', '')}" if isinstance(value, Attack) else ""
    ),
)
def test_bad_attacks_fail(attack, fails, why):
    found = outcomes(attack)
    assert fails <= failed(found)
    assert any(why in outcome.why for outcome in found.values() if outcome.verdict == "FAIL")
    if type(attack) is ByHand:  # and for nothing else
        assert failed(found) <= fails | {"a narrow ridge", "logits times 1000"} | (
            MULTIPLE | FLOOR | OTHERS | PROMISES if attack.wrong == "nan" else set()
        )


def test_libraries_stand_still_where_the_softmax_saturates():
    found = outcomes(TorchAttacks(name="PGD"))
    assert failed(found) == {"logits times 1000", "a narrow ridge"}
    assert found["logits times 1000"].reached == "0 broken"


def test_what_an_attack_cannot_serve_is_skipped_with_the_reason():
    found = outcomes(PGD(loss="dlr"))
    skipped = {name for name, outcome in found.items() if outcome.verdict == "skipped"}
    assert "linear, 2 classes" in skipped
    assert "needs at least 3 classes" in found["linear, 2 classes"].why
    assert found["linear, 5 classes, 3 channels"].verdict == "pass"
    found = outcomes(Transfer(), replace(LINF, access="labels"))
    assert found["a narrow ridge"].why == "the attack asks the victim nothing"
    assert failed(found) == set()


def test_a_query_budget_is_kept_to():
    found = outcomes(PGD(steps=20), replace(LINF, query_budget=10))
    assert "threat.query_budget=10" in found["linear, 2 classes"].why
    assert failed(found) >= LINEAR


@pytest.mark.parametrize(
    ("attack", "threat", "complaint"),
    [
        (PGD(), replace(LINF, epsilon=0), "threat.epsilon=0 leaves nothing to attack"),
        (PGD(), replace(LINF, access="scores"), "needs access to gradients"),
        (PGD(), ThreatModel(norm="l0", epsilon=1), "does not serve threat.norm=l0"),
    ],
)
def test_an_attack_that_does_not_fit_is_told_at_once(attack, threat, complaint):
    with pytest.raises(UserError, match=complaint):
        outcomes(attack, threat)


def test_a_large_budget_leaves_nothing_that_cannot_be_broken():
    large = replace(LINF, epsilon=0.9)
    assert all((case.needed < 1).all() for case in cases(PGD(), large) if not case.masked)
    assert failed(outcomes(PGD(), large)) == set()


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call the command in an empty folder; gives exit code and output."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("COLUMNS", "160")

    def call(*words):
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_prints_a_table(cli):
    code, out, _ = cli("attack=fgsm", "threat.epsilon=8/255")
    assert code == 0
    assert "PGD under linf 8/255, access to gradients" in out
    assert all(name in out for name in LINEAR | FLOOR | OTHERS | PROMISES)
    assert "14 passed, 0 failed, 0 skipped" in out
    assert list(Path().iterdir()) == []


OWN = """
from dataclasses import dataclass
from robustbench_local.attacks import PGD

@dataclass(frozen=True, kw_only=True)
class Mine(PGD):
    shrink: float = 1.0

    def run(self, model, x, y, threat):
        x_adv = super().run(model, x, y, threat)
        return x + self.shrink * (x_adv - x)
"""


def test_an_attack_of_ones_own_by_its_class(cli):
    Path("my_attacks.py").write_text(OWN)
    words = ("attack._target_=my_attacks.Mine", "+attack.steps=12", "+attack.step_size=0.25")
    code, out, _ = cli(*words)
    assert code == 0
    assert "Mine under linf 0.3" in out
    code, out, _ = cli(*words, "+attack.shrink=0.8")
    assert code == 1
    assert "misses 11 of the 12 that 97% of the optimum breaks" in out


IDLE = """
from robustbench_local.attacks import Attack

class Idle(Attack):
    needs = "labels"
    norms = frozenset({"linf"})

    def run(self, model, x, y, threat):
        return x
"""


def test_an_attack_of_ones_own_that_does_nothing(cli):
    Path("my_attacks3.py").write_text(IDLE)
    code, out, _ = cli("attack._target_=my_attacks3.Idle")
    assert code == 1
    assert "4 passed, 1 failed, 9 skipped" in out


def test_an_attack_of_ones_own_in_a_folder(cli):
    Path("my_attacks2.py").write_text(OWN)
    Path("mine/attack").mkdir(parents=True)
    Path("mine/attack/mine.yaml").write_text(
        "_target_: my_attacks2.Mine\nseed: ${seed}\nsteps: 12\nstep_size: 0.25\nshrink: 0.7\n"
    )
    code, out, _ = cli("attack=mine", "--config-dir", "mine")
    assert code == 1
    assert "FAIL" in out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("attack=pgdd",), "type attack=pgd"),
        (("attack=pgd", "threat.norm=l0", "threat.epsilon=1"), "does not serve threat.norm=l0"),
        (("attack=pgd", "attack.stepz=3"), "attack.stepz is not a key"),
        (("attack=pgd", "attack.steps=0"), "attack.steps=0"),
        (
            ("attack._target_=collections.OrderedDict",),
            "attack._target_=collections.OrderedDict makes no attack but OrderedDict",
        ),
        (("attack=pgd", "--config-dir"), "--config-dir came without a folder"),
        (("--config-dir", "absent", "attack=pgd"), "--config-dir absent is not there"),
        (("--config-dir", "attack=pgd"), "--config-dir attack=pgd is not there"),
    ],
)
def test_bad_input_is_told_in_a_sentence(cli, words, complaint):
    code, out, err = cli(*words)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert complaint in err
    assert len(err.splitlines()) == 1


def test_help_names_commands(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert "python -m robustbench_local.selftest attack=pgd" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["attack=pgd", "attack.steps=3"], ["attack=pgd", "attack.steps=3"]),
        (
            ["attack._target_=a.B", "+attack.steps=3", "threat.norm=l2"],
            [
                "~attack",
                "++attack._target_=a.B",
                "++attack.steps=3",
                "threat.norm=l2",
                "++attack.seed=${seed}",
            ],
        ),
        (["attack=pgd", "attack._target_=a.B"], ["attack=pgd", "attack._target_=a.B"]),
        (
            ["attack._target_=a.B", "+attack.seed=5"],
            ["~attack", "++attack._target_=a.B", "++attack.seed=5"],
        ),
    ],
)
def test_a_class_of_ones_own_gets_no_keys_of_another(words, expected):
    assert own_attack(words) == expected

"""The authors' AutoAttack behind our interface: the same result, and nothing left behind."""

import importlib.util
import logging
import sys

import pyautoattack
import pytest
import torch
from test_closed_forms import images, middling_epsilon, predict, victim
from torch import Tensor, nn

from robustbench_local.attacks import APGD, AutoAttack
from robustbench_local.attacks import autoattack as module
from robustbench_local.errors import UserError
from robustbench_local.oracle import Oracle
from robustbench_local.threat import BudgetError, ThreatModel
from robustbench_local.types import Norm

norms = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


def middling(
    norm: Norm, classes: int = 5, count: int = 30
) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
    model, x = victim((1, 8, 8), classes), images((1, 8, 8), count)
    y = predict(model, x)
    return model, x, y, ThreatModel(norm=norm, epsilon=middling_epsilon(model, x, y, norm))


@norms
def test_does_what_the_package_does(norm: Norm) -> None:
    """The images are the same but for a rounding, with so many steps in both."""
    model, x = victim((1, 8, 8), 12), images((1, 8, 8), 16)
    y = predict(model, x)
    threat = ThreatModel(norm=norm, epsilon={"linf": 0.032, "l2": 0.17, "l1": 0.41}[norm])
    x_adv = AutoAttack(version="rand", steps=10)(model, x, y, threat)

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    theirs = pyautoattack.AutoAttack(model, norm=name, eps=threat.epsilon, version="rand", seed=0)
    theirs.apgd = pyautoattack.autoattack.APGDAttack(
        model, n_iter=10, norm=name, eps=threat.epsilon, eot_iter=20, logger=theirs.logger
    )
    with torch.random.fork_rng([]):
        expected, _ = theirs.run_standard_evaluation(x, y, batch_size=len(x))
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=2e-6)
    assert 0 < int((predict(model, x_adv) != y).sum()) < len(x)


def test_fewer_steps_are_those_of_its_own_constructor() -> None:
    model, _, _, threat = middling("linf", classes=12)
    mine = AutoAttack(steps=40, queries=70)._build(model, torch.zeros(1), threat, 12)
    for name in ("apgd", "apgd_targeted"):
        theirs = pyautoattack.autoattack.APGDAttack(model, n_iter=40, eps=threat.epsilon)
        for value in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr"):
            assert getattr(getattr(mine, name), value) == getattr(theirs, value)
    assert (mine.fab.n_iter, mine.square.n_queries) == (40, 70)
    whole = AutoAttack()._build(model, torch.zeros(1), threat, 12)
    assert (whole.apgd.n_iter, whole.square.n_queries, whole.fab.n_target_classes) == (100, 5000, 9)


@pytest.mark.parametrize(
    ("classes", "version", "runs", "left_out"),
    [
        (2, "standard", ["apgd-ce", "fab-t", "square"], "apgd-t (fewer than 4 classes)"),
        (3, "standard", ["apgd-ce", "fab-t", "square"], "apgd-t (fewer than 4 classes)"),
        (2, "rand", ["apgd-ce"], "apgd-dlr (fewer than 3 classes)"),
        (4, "standard", ["apgd-ce", "apgd-t", "fab-t", "square"], None),
    ],
)
def test_few_classes(classes: int, version: str, runs: list[str], left_out: str | None) -> None:
    model, x, y, threat = middling("linf", classes=classes)
    attack = AutoAttack(version=version, steps=5, queries=20)
    built = attack._build(model, x, threat, classes)
    assert built.attacks_to_run == runs
    assert built.fab.n_target_classes == classes - 1
    threat.check(attack(model, x, y, threat), x)
    assert attack.report(threat).get("left_out") == left_out


def test_says_nothing_and_leaves_the_log_and_the_tracer(capfd: pytest.CaptureFixture[str]) -> None:
    model, x, y, threat = middling("linf")
    logger, calls = logging.getLogger("auto-attack"), []
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    before = sys.gettrace()
    try:
        sys.settrace(lambda *_: calls.append(1))
        ours = sys.gettrace()
        AutoAttack(steps=2, queries=3)(model, x, y, threat)
        assert sys.gettrace() is ours
    finally:
        sys.settrace(before)
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert not logger.disabled
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_what_it_asks_is_counted() -> None:
    model, x, y, threat = middling("linf")
    oracle = Oracle(model, threat, 5)
    AutoAttack(version="rand", steps=4)(oracle, x, y, threat)
    # 20 samples at each of 5 points of two attacks, on at most all images.
    assert 20 * 5 * len(x) < oracle.backward_passes <= 2 * 20 * 5 * len(x)


@norms
def test_only_a_rounding_is_brought_back(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, _ = middling(norm)
    x = 0.3 + 0.4 * x
    threat = ThreatModel(norm=norm, epsilon=0.1)
    unit = torch.ones_like(x)
    unit /= threat.size(x + unit, x).view(-1, 1, 1, 1).float()

    def returning(length: float) -> None:
        result = x + threat.epsilon * length * unit
        monkeypatch.setattr(
            pyautoattack.AutoAttack, "run_standard_evaluation", lambda *_, **__: (result, y)
        )

    returning(1 + 5e-6)
    threat.check(AutoAttack()(model, x, y, threat), x)
    returning(1.001)
    with pytest.raises(BudgetError):
        threat.check(AutoAttack()(model, x, y, threat), x)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        module, "find_spec", lambda name: None if name == "pyautoattack" else find(name)
    )
    with pytest.raises(UserError, match="pip install pyautoattack"):
        AutoAttack().require(ThreatModel(norm="linf", epsilon=0.1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"version": "custom"}, "attack.version=custom is unknown"),
        ({"steps": 0}, "attack.steps=0"),
        ({"queries": -3}, "attack.queries=-3"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AutoAttack(**wrong)  # type: ignore[arg-type]


def test_apgd_is_no_weaker_than_the_whole() -> None:
    """On a linear victim the targeted ascents find all there is, so AutoAttack finds no more."""
    model, x, y, threat = middling("linf", classes=6, count=60)
    left = [
        int((predict(model, attack(model, x, y, threat)) == y).sum())
        for attack in (APGD(loss="dlr_targeted", steps=40), AutoAttack(steps=40, queries=50))
    ]
    assert left[0] <= left[1]

"""One attack against every victim, judged by the harness."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from robustbench_local.attacks import Attack, Noise, Transfer
from robustbench_local.attacks.transfer import Source
from robustbench_local.data import Split
from robustbench_local.errors import FoulError, UserError
from robustbench_local.evaluation.audit.victim import zero_gradient
from robustbench_local.evaluation.audit.watch import Watch
from robustbench_local.evaluation.judge import exact, judge
from robustbench_local.gradients import pristine
from robustbench_local.oracle import Oracle, QueryBudgetError
from robustbench_local.selftest import contract
from robustbench_local.selftest.cases import DRAWS, Case, ambition, cases
from robustbench_local.selftest.victims import Delicate
from robustbench_local.threat import ThreatModel

Verdict: TypeAlias = Literal["pass", "FAIL", "skipped"]

Maker: TypeAlias = Callable[[int], Attack]
"""Makes the attack for a number of draws to average, where its settings leave that open."""


@dataclass(frozen=True)
class Outcome:
    """How an attack did on one victim: what is known of it, what was reached, and a sentence."""

    victim: str
    known: str
    reached: str
    verdict: Verdict
    why: str


def selftest(make: Maker, threat: ThreatModel) -> Iterator[Outcome]:
    """Everything there is to try. Raises `UserError` for an attack that does not fit the threat."""
    if threat.epsilon == 0:
        raise UserError(
            "threat.epsilon=0 leaves nothing to attack; type for example threat.epsilon=0.3"
        )
    attack = make(1)
    attack.require(threat)
    for case in cases(attack, threat):
        yield _measured(make(DRAWS if case.random else 1), threat, case)
    yield from _contract(attack, threat)


def _contract(attack: Attack, threat: ThreatModel) -> Iterator[Outcome]:
    model = Delicate(contract.CHANNELS, contract.CLASSES)
    oracle = Oracle(model, threat, contract.CLASSES, randomized=False)
    shape = (contract.CHANNELS, 8, 8)
    promises = {
        "a small network": ("nothing may be left changed", contract.broken_promises),
        "the same at epsilon 0": ("nothing may be changed", contract.at_epsilon_zero),
        "breaks down at once": ("the exception must come through", contract.after_one_call),
        "breaks down later": ("the exception must come through", contract.after_three_calls),
    }
    for name, (known, broken) in promises.items():

        def complaints(broken: contract.Promise = broken) -> list[str]:
            return list(broken(_ready(attack, oracle, shape), threat))

        told = _tried(complaints)
        if isinstance(told, list):
            verdict: Verdict = "FAIL" if told else "pass"
            yield Outcome(name, known, "", verdict, "; ".join(told) or "keeps its promises")
        else:
            yield Outcome(name, known, "", *told)


def _measured(attack: Attack, threat: ThreatModel, case: Case) -> Outcome:
    """Attack one victim and compare with what is known."""
    told = _tried(
        lambda: _lost(attack, threat, case) if case.path else _broken(attack, threat, case)
    )
    if not isinstance(told, Tensor):
        return Outcome(case.name, case.known, "-", *told)
    if not case.path:
        return _compared(attack, threat, case, told)
    if bool(told.isnan().all()):
        return Outcome(case.name, case.known, "-", "skipped", "the attack asks the victim nothing")
    lost = int(told.sum())
    reached = f"{lost} lost"
    if lost:
        why = f"asked about an adversarial image and returned another: {lost} of {len(told)}"
        return Outcome(case.name, case.known, reached, "FAIL", why)
    why = "returns every adversarial image it came across"
    return Outcome(case.name, case.known, reached, "pass", why)


def _broken(attack: Attack, threat: ThreatModel, case: Case) -> Tensor:
    """Which images the judge takes for broken, bool (N,): most draws of a random victim."""
    oracle = Oracle(case.victim, threat, case.classes, randomized=case.random)
    ready = _ready(attack, oracle, tuple(case.x.shape[1:]))
    oracle.begin(len(case.x))
    with exact():
        x_adv = ready(oracle, case.x.clone(), case.y, threat)
    classes, draws = case.classes, DRAWS if case.random else 1
    verdict = judge(case.victim, x_adv, case.x, case.y, threat, num_classes=classes, draws=draws)
    return verdict.correct.double().mean(1) < 0.5


def _lost(attack: Attack, threat: ThreatModel, case: Case) -> Tensor:
    """Images of which an adversarial one was asked about and not returned; NaN: none was asked.

    One image at a time: then it is certain what each question is about.
    """
    oracle = Oracle(case.victim, threat, case.classes, randomized=False)
    ready = _ready(attack, oracle, tuple(case.x.shape[1:]))
    lost = []
    for row in torch.split(torch.arange(len(case.x)), 1):
        x, y = case.x[row], case.y[row]
        watch = Watch.of(oracle, x, y, strays=False, paths=False)
        watch.begin(1)
        with exact():
            x_adv = ready(watch, x.clone(), y, threat)
        asked = watch.forward_passes > 0
        verdict = judge(case.victim, x_adv, x, y, threat, num_classes=case.classes)
        missed = bool(watch.worst > 0) and bool(verdict.correct.all())
        lost.append(float(missed) if asked else torch.nan)
    return torch.tensor(lost)


def _compared(attack: Attack, threat: ThreatModel, case: Case, broken: Tensor) -> Outcome:
    right = case.needed > 0
    count = int((broken & right).sum())
    reached = f"{count} broken"

    def outcome(verdict: Verdict, why: str) -> Outcome:
        return Outcome(case.name, case.known, reached, verdict, why)

    if bool((broken & (case.needed > 1)).any()) and not case.masked:
        return outcome("FAIL", "breaks what no perturbation inside the budget breaks")
    share = ambition(attack, threat, case.classes)
    wanted = right & (case.needed <= (share or 1))
    missed = int((wanted & ~broken).sum())
    if case.masked and missed and attack.needs == "gradients":
        flag = zero_gradient(case.victim, case.x, case.y, attack)
        if flag.raised:
            return outcome("pass", f"{missed} resist, as expected; the audit says {flag.name}")
    if case.random and attack.minimum_norm:
        why = "nothing is demanded: the boundary it looks for moves"
        return outcome("pass" if count else "skipped", why)
    if share == 0:
        return outcome(*_beside_noise(threat, case, count))
    demand = f"{int(wanted.sum())} that {100 * share:.0f}% of the optimum breaks"
    if missed:
        return outcome("FAIL", f"misses {missed} of the {demand}")
    return outcome("pass" if count else "skipped", f"all {demand}")


def _beside_noise(threat: ThreatModel, case: Case, count: int) -> tuple[Verdict, str]:
    """Breaking so many images, of an attack that is not held to an optimum."""
    unlimited = replace(threat, query_budget=None)
    by_noise = int((_broken(Noise(), unlimited, case) & (case.needed > 0)).sum())
    if count < by_noise:
        return "FAIL", f"breaks fewer than random noise does: {by_noise}"
    if count == 0:
        return "skipped", "nothing is demanded of this kind of attack here, and it breaks nothing"
    return "pass", f"no optimum is demanded here; random noise breaks {by_noise}"


def _tried(call: Callable[[], Tensor | list[str]]) -> Tensor | list[str] | tuple[Verdict, str]:
    """What the call gives, or what its exception means."""
    try:
        return call()
    except (FoulError, QueryBudgetError) as error:
        return "FAIL", str(error)
    except UserError as error:
        return "skipped", str(error)
    except Exception as error:  # a user's own attack may raise anything
        return "FAIL", f"{type(error).__name__}: {error}"


def _ready(attack: Attack, oracle: Oracle, shape: tuple[int, ...]) -> Attack:
    """The attack with what it prepares: on images of its own, or on the victim as a source."""
    if isinstance(attack, Transfer):
        attack = attack.with_models([Source("seed:0", oracle.victim, "", "")])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (600, *shape), generator=generator).to(torch.uint8)
    split = Split(images, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)))
    with pristine(oracle.victim), torch.no_grad():
        labels = oracle.victim(split.pixels(slice(None))).argmax(1)
    return attack.fit(oracle, Split(images, labels, split.indices), oracle.threat)

"""The checks that attack the victim again: is the attack as strong as it should be?

Sources: Carlini et al. 2019 (arXiv:1902.06705, sections 4 and 5), Croce and Hein 2020
(arXiv:2003.01690), Pintor et al. 2022 (arXiv:2106.09947).
"""

from collections.abc import Callable, Mapping
from functools import partial

from robustbench_local.attacks import Attack
from robustbench_local.data import Split
from robustbench_local.evaluation.audit.case import Case
from robustbench_local.evaluation.audit.check import (
    COSTLY,
    Check,
    attempted,
    count,
    found,
    skipped,
    told,
)
from robustbench_local.evaluation.audit.comparison import (
    accuracy,
    is_more_than_chance,
    shares_apart,
)
from robustbench_local.evaluation.audit.config import Audit
from robustbench_local.evaluation.audit.frozen import frozen_randomness
from robustbench_local.evaluation.audit.rivals import (
    noise_as_strong,
    weaker_than_black_box,
    weaker_than_fgsm,
)
from robustbench_local.evaluation.audit.trials import Trials, VariationError
from robustbench_local.evaluation.audit.variations import fresh, longer, scaled, whole_range
from robustbench_local.evaluation.audit.watched import loss_still_falling, silent_success
from robustbench_local.evaluation.evaluate import Judging
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Model


def audit_attack(
    oracle: Oracle,
    attack: Attack,
    split: Split,
    threat: ThreatModel,
    *,
    config: Audit,
    judging: Judging,
    batch_size: int,
    sources: Mapping[str, Model] | None = None,
) -> list[Check]:
    """Every check of `COSTLY`, made on the first images of `split` or skipped with a reason.

    `oracle`, `threat`, `judging` and `batch_size` are those of the evaluation, `attack` is ready
    (fitted, with its models). `sources` are other models, by name, from which images may carry
    over: the network without its defense, for one. The oracle counts nothing of all this. A check
    that breaks down is skipped too, with what the exception said: the evaluation is done and must
    not be lost over it.
    """
    if config.level == "cheap":
        return [skipped(name, "audit=full makes this check") for name in COSTLY]
    if judging.victim is not None and judging.victim is not oracle.victim:
        return [skipped(name, "the attack does not face the defense") for name in COSTLY]
    oracle = Oracle(oracle.victim, threat, oracle.num_classes, randomized=oracle.randomized)
    try:
        trials = Trials(oracle, split, judging=judging, batch_size=batch_size, sample=config.sample)
        case = Case(trials, oracle, fresh(attack), split, config, judging.seed, dict(sources or {}))
    except Exception as error:
        why = f"the sample could not be looked at: {told(error)}"
        return [skipped(name, why) for name in COSTLY]
    return [attempted(name, partial(_check, name, case)) for name in COSTLY]


def _check(name: str, case: Case) -> Check:
    reason = case.why_not(name)
    if reason is not None:
        return skipped(name, reason)
    try:
        return _MADE[name](case)
    except VariationError as error:
        return skipped(name, f"the attack could not be varied: {error}")


def _not_converged(case: Case) -> Check:
    factor = case.config.factor
    attack = longer(case.attack, factor)
    if attack is None:
        return skipped("not_converged", "the attack has no steps, queries or restarts to raise")
    more = case.trials.run("longer", attack, case.threat)  # within the same query budget
    apart = shares_apart(case.base.correct, more)
    raised = case.differs(apart, case.config.points) or case.differs(-apart, case.config.points)
    measured = {
        "robust_accuracy": accuracy(case.base.correct),
        "longer": accuracy(more),
        "factor": factor,
        "n": len(case.trials),
    }
    why = (
        f"{factor} times as long, the attack leaves {100 * measured['longer']:.1f}% of "
        f"{len(case.trials)} images, and {100 * measured['robust_accuracy']:.1f}% as it is"
    )
    return found("not_converged", raised, measured, why)


def _non_monotone_epsilon(case: Case) -> Check:
    name, trials = "non_monotone_epsilon", case.trials
    others = [scaled(case.threat, trials.x, factor) for factor in case.config.epsilon_factors]
    curve = {case.threat.epsilon: case.base.correct}
    for threat in others:
        if threat.epsilon not in curve:
            curve[threat.epsilon] = trials.run(f"epsilon {threat.epsilon!r}", case.attack, threat)
    if len(curve) == 1:
        return skipped(name, "there is no other radius to compare with")
    radii = sorted(curve)
    rises = {
        (low, high): shares_apart(curve[high], curve[low])
        for place, low in enumerate(radii)
        for high in radii[place + 1 :]
    }
    # The noise of every rise counts, of a deterministic victim too: another radius, another search.
    raised = any(is_more_than_chance(rise, case.config, random=True) for rise in rises.values())
    (low, high), worst = max(rises.items(), key=lambda item: float(item[1].sum()))
    measured = {
        "epsilon": radii,
        "robust_accuracy": [accuracy(curve[radius]) for radius in radii],
        "n": len(trials),
    }
    why = "robust accuracy does not rise with epsilon"
    if float(worst.sum()) > 0:
        why = (
            f"from epsilon {low:.4g} to {high:.4g} robust accuracy rises by "
            f"{float(worst.sum()):.3g} of {count(len(trials), 'image')}"
            f"{'' if raised else ', no more than chance may do'}"
        )
    return found(name, raised, measured, why)


def _unconstrained_failure(case: Case) -> Check:
    trials, left, radii = case.trials, case.trials.right, []
    for share in case.config.unbounded:
        if len(left) == 0:
            break
        threat = whole_range(case.threat, trials.x, share)
        radii.append(threat.epsilon)
        correct = trials.run(f"unbounded {share}", case.attack, threat, rows=left)
        left = left[correct[left].double().mean(1) > 0.5]
    measured = {"failed": len(left), "attacked": len(trials.right), "epsilon": radii}
    sizes = " and ".join(f"{radius:.4g}" for radius in radii)
    why = (
        f"{len(left)} of {count(len(trials.right), 'image')} resist the attack even at epsilon "
        f"{sizes}, where nothing is left of them"
    )
    if len(left) == 0:
        why = f"without a bound (epsilon {sizes}) every image falls"
    return found("unconstrained_failure", len(left) > 0, measured, why)


_MADE: Mapping[str, Callable[[Case], Check]] = {
    "silent_success": lambda case: silent_success(case.trials, case.base),
    "loss_still_falling": lambda case: loss_still_falling(
        case.trials, case.base, case.attack, case.config
    ),
    "not_converged": _not_converged,
    "non_monotone_epsilon": _non_monotone_epsilon,
    "unconstrained_failure": _unconstrained_failure,
    "weaker_than_fgsm": weaker_than_fgsm,
    "weaker_than_black_box": weaker_than_black_box,
    "noise_as_strong": noise_as_strong,
    "frozen_randomness": frozen_randomness,
}

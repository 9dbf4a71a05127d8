"""The checks that attack the victim again: is the attack as strong as it should be?

Sources: Carlini et al. 2019 (arXiv:1902.06705, sections 4 and 5), Croce and Hein 2020
(arXiv:2003.01690), Pintor et al. 2022 (arXiv:2106.09947).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from robustbench_local.attacks import PGD, Attack, Noise
from robustbench_local.data import Split
from robustbench_local.errors import FoulError, UserError
from robustbench_local.evaluation.audit.applicability import why_not
from robustbench_local.evaluation.audit.check import COSTLY, Check, count, found, skipped
from robustbench_local.evaluation.audit.comparison import (
    accuracy,
    broken_besides,
    is_more_than_chance,
    shares_apart,
)
from robustbench_local.evaluation.audit.config import Audit
from robustbench_local.evaluation.audit.frozen import frozen_randomness
from robustbench_local.evaluation.audit.trials import Trials
from robustbench_local.evaluation.audit.variations import (
    black_box,
    fresh,
    longer,
    one_step,
    open_to,
    scaled,
    whole_range,
)
from robustbench_local.evaluation.audit.watched import (
    Watched,
    loss_still_falling,
    silent_success,
    watched,
)
from robustbench_local.evaluation.evaluate import Judging
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Model


def audit_attack(
    oracle: Oracle,
    attack: Attack,
    split: Split,
    *,
    config: Audit,
    judging: Judging,
    batch_size: int,
    sources: Mapping[str, Model] | None = None,
) -> list[Check]:
    """Every check of `COSTLY`, made on the first images of `split` or skipped with a reason.

    `oracle`, `judging` and `batch_size` are those of the evaluation, `attack` is ready (fitted,
    with its models). `sources` are other models, by name, from which images may carry over: the
    network without its defense, for one. What the checks ask is not counted by the oracle.
    """
    if config.level == "cheap":
        return [skipped(name, "audit=full makes this check") for name in COSTLY]
    if judging.victim is not None and judging.victim is not oracle.victim:
        return [skipped(name, "the attack does not face the defense") for name in COSTLY]
    trials = Trials(oracle, split, judging=judging, batch_size=batch_size, sample=config.sample)
    case = _Case(trials, oracle, fresh(attack), split, config, judging.seed, dict(sources or {}))
    return [_check(name, case) for name in COSTLY]


@dataclass(frozen=True)
class _Case:
    """What all checks of one attack share."""

    trials: Trials
    oracle: Oracle
    attack: Attack
    split: Split
    config: Audit
    seed: int
    sources: Mapping[str, Model]

    @cached_property
    def base(self) -> Watched:
        """The attack on the sample as the evaluation runs it."""
        paths = self.why_not("loss_still_falling") is None
        return watched(self.trials, fresh(self.attack), paths=paths)

    @property
    def threat(self) -> ThreatModel:
        return self.trials.threat

    @property
    def survivors(self) -> Tensor:
        """Rows of the images that resist the attack in some draw."""
        return self.base.correct.any(1).nonzero().squeeze(1)

    def why_not(self, name: str) -> str | None:
        if len(self.trials.right) == 0:
            return f"none of {count(len(self.trials), 'image')} is classified correctly"
        return why_not(
            name, self.attack, self.threat, self.config, random=self.trials.random
        )

    def differs(self, apart: Tensor, points: float = 0.0) -> bool:
        return is_more_than_chance(apart, self.config, random=self.trials.random, points=points)


def _check(name: str, case: _Case) -> Check:
    reason = case.why_not(name)
    if reason is not None:
        return skipped(name, reason)
    try:
        return _MADE[name](case)
    except (UserError, FoulError) as error:
        # The evaluation itself went through: what another radius or length does is no foul of its.
        return skipped(name, f"the attack could not be varied: {error}")


def _silent_success(case: _Case) -> Check:
    return silent_success(case.trials, case.base)


def _loss_still_falling(case: _Case) -> Check:
    return loss_still_falling(case.trials, case.base, case.attack, case.config)


def _not_converged(case: _Case) -> Check:
    factor, budget = case.config.factor, case.threat.query_budget
    attack = longer(case.attack, factor)
    if attack is None:
        return skipped("not_converged", "the attack has no steps, queries or restarts to raise")
    threat = replace(case.threat, query_budget=None if budget is None else factor * budget)
    more = case.trials.run("longer", attack, threat)
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


def _non_monotone_epsilon(case: _Case) -> Check:
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
        )
    return found(name, raised, measured, why)


def _unconstrained_failure(case: _Case) -> Check:
    trials, left, radii = case.trials, case.trials.right, []
    for share in case.config.unbounded:
        if len(left) == 0:
            break
        threat = whole_range(case.threat, trials.x, share)
        radii.append(threat.epsilon)
        correct = trials.run(f"unbounded {share}", case.attack, threat, rows=left)
        left = left[correct[left].double().mean(1) > 0.5]
    measured = {"failed": len(left), "attacked": len(trials.right), "epsilon": radii}
    told = " and ".join(f"{radius:.4g}" for radius in radii)
    why = (
        f"{len(left)} of {count(len(trials.right), 'image')} resist the attack even at epsilon "
        f"{told}, where nothing is left of them"
    )
    if len(left) == 0:
        why = f"without a bound (epsilon {told}) every image falls"
    return found("unconstrained_failure", len(left) > 0, measured, why)


def _weaker_than_fgsm(case: _Case) -> Check:
    attack = one_step(case.attack)
    other = case.trials.run("fgsm", attack, open_to(case.threat, attack), rows=case.survivors)
    apart = broken_besides(case.base.correct, other)
    measured = _besides(case, apart)
    return found(
        "weaker_than_fgsm",
        case.differs(apart),
        measured,
        _told(case, apart, "one gradient step"),
    )


def _weaker_than_black_box(case: _Case) -> Check:
    config, trials = case.config, case.trials
    budget = case.threat.query_budget
    queries = config.black_box_queries if budget is None else min(config.black_box_queries, budget)
    search = black_box(case.attack, case.threat, queries)
    threat = open_to(case.threat, search)
    others = {f"{type(search).__name__} with {queries} queries": trials.run(
        "black box", search, threat, rows=case.survivors
    )}  # fmt: skip
    if case.threat.norm not in ("l0", "spatial"):
        carried = PGD(early_stop=False, best_iterate=False, seed=case.attack.seed)
        for source, model in case.sources.items():
            others[f"transfer from {source}"] = trials.run(
                f"transfer {source}",
                carried,
                open_to(case.threat, carried),
                rows=case.survivors,
                face=lambda x, y, threat, model=model: model,
            )
    besides = {name: broken_besides(case.base.correct, other) for name, other in others.items()}
    raised = [name for name, apart in besides.items() if case.differs(apart, config.black_box_points)]
    name = max(raised or besides, key=lambda name: float(besides[name].sum()))
    measured = {"n": len(trials), "resisting": len(case.survivors)}
    measured["broken_besides"] = {name: float(apart.sum()) for name, apart in besides.items()}
    return found(
        "weaker_than_black_box", bool(raised), measured, _told(case, besides[name], name)
    )


def _noise_as_strong(case: _Case) -> Check:
    draws = case.config.noise_draws
    attack = Noise(samples=draws, seed=case.attack.seed)
    other = case.trials.run("noise", attack, open_to(case.threat, attack), rows=case.survivors)
    apart = broken_besides(case.base.correct, other)
    measured = {**_besides(case, apart), "draws": draws}
    why = _told(case, apart, f"noise ({draws} draws of the same size)")
    return found("noise_as_strong", case.differs(apart), measured, why)


def _frozen_randomness(case: _Case) -> Check:
    return frozen_randomness(
        case.oracle,
        case.attack,
        case.split,
        case.base.correct,
        config=case.config,
        seed=case.seed,
    )


def _besides(case: _Case, apart: Tensor) -> dict[str, float]:
    return {
        "broken_besides": float(apart.sum()),
        "resisting": len(case.survivors),
        "n": len(case.trials),
    }


def _told(case: _Case, apart: Tensor, what: str) -> str:
    resisting = len(case.survivors)
    if resisting == 0:
        return "no image resists the attack"
    images = float(apart.sum())
    share = f"{max(0.0, images):.3g} of the {count(resisting, 'image')} that resist"
    return f"{what} breaks {share}"


_MADE = {
    "silent_success": _silent_success,
    "loss_still_falling": _loss_still_falling,
    "not_converged": _not_converged,
    "non_monotone_epsilon": _non_monotone_epsilon,
    "unconstrained_failure": _unconstrained_failure,
    "weaker_than_fgsm": _weaker_than_fgsm,
    "weaker_than_black_box": _weaker_than_black_box,
    "noise_as_strong": _noise_as_strong,
    "frozen_randomness": _frozen_randomness,
}

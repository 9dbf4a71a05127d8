"""How many draws of a random victim an attacker averages: as many as change the answer.

Expectation over transformation, Athalye et al. 2018, arXiv:1707.07397.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from robustbench_local.attacks import Attack
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.evaluation.audit import SEVERE, Check
from robustbench_local.evaluation.evaluate import Judging, evaluate
from robustbench_local.oracle import Oracle, QueryBudgetError


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """How `raise_samples` goes about it: on the first `sample` images, up to `limit` draws.

    A number is enough where twice as many lower robust accuracy by `tolerance` at most. The number
    that is declared is believed where `sample` is 0 and where twice as many are above `limit`.
    """

    sample: int
    limit: int
    tolerance: float

    def __post_init__(self) -> None:
        for name, least in (("sample", 0), ("limit", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(
                    f"eot.{name}={value}; expected a whole number from {least}: type for example "
                    f"eot.{name}=80"
                )
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance < 1:
            raise UserError(
                f"eot.tolerance={self.tolerance}; expected a share of the images, from 0 to below "
                "1: type for example eot.tolerance=0.02"
            )


@dataclass(frozen=True)
class Samples:
    """The number of draws settled on, and every number tried: JSON values."""

    samples: int
    tried: tuple[dict[str, Any], ...]
    stable: bool | None  # None: no two numbers were compared


def raise_samples(
    oracle: Oracle,
    attack: Callable[[int], Attack],
    split: Split,
    declared: int,
    averaging: Averaging,
    *,
    batch_size: int,
    judging: Judging,
) -> Samples:
    """Double the number of draws until robust accuracy falls no further; see `Averaging`.

    `attack` makes the attack for a number of draws, `declared` is the first. What is settled on is
    the number that left the least robust accuracy, the smallest of equals. `stable` is False where
    the last doubling still lowered it and `limit`, or the query budget of the threat model, allows
    no further one. All numbers meet the same images and the same draws of the judge, and are judged
    like the evaluation itself.
    """
    if averaging.sample == 0 or 2 * declared > averaging.limit:
        return Samples(declared, (), None)
    rows = torch.arange(min(averaging.sample, len(split)))
    on_device = rows.to(split.labels.device)
    some = Split(split.images[on_device], split.labels[on_device], split.indices[rows])

    def robust(samples: int) -> float:
        outcome = evaluate(oracle, attack(samples), some, batch_size=batch_size, judging=judging)
        left = round(float(outcome.examples.robust_correct.mean()), 9)  # equal shares are equal
        tried.append({"samples": samples, "robust_accuracy": left, "n": len(some)})
        return left

    tried: list[dict[str, Any]] = []
    stable = None
    samples, left = declared, robust(declared)
    while not stable and 2 * samples <= averaging.limit:
        try:
            more = robust(2 * samples)
        except QueryBudgetError:
            break
        stable = round(left - more, 9) <= averaging.tolerance
        samples, left = 2 * samples, more
    best = min(tried, key=lambda each: each["robust_accuracy"])
    return Samples(best["samples"], tuple(tried), stable)


def audit_samples(averaged: Samples | None) -> Check:
    """Whether more draws would break more: the flag `eot_unstable`.

    None: the victim is not random, or the attack does not leave open how many draws it averages.
    """
    measured: dict[str, Any] = {}
    raised = None
    if averaged is None:
        why = "the attack faces no random victim, or its number of draws is set"
    elif averaged.stable is None:
        why = f"no number of draws was compared with the {averaged.samples} that are averaged"
    else:
        raised, measured = not averaged.stable, {"tried": list(averaged.tried)}
        left = [f"{each['samples']}: {each['robust_accuracy']:.1%}" for each in averaged.tried]
        why = f"robust accuracy on a sample by draws averaged: {', '.join(left)}"
        if raised:
            why += "; the last doubling still broke more: raise eot.limit or threat.query_budget"
    return Check("eot_unstable", SEVERE["eot_unstable"], raised, measured, why)

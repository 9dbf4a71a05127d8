"""How many draws of a random victim an attacker averages: as many as change the answer.

Expectation over transformation, Athalye et al. 2018, arXiv:1707.07397.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from robustbench_local.attacks import Attack
from robustbench_local.data import Split
from robustbench_local.evaluation.evaluate import Judging, evaluate
from robustbench_local.oracle import Oracle


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """How `raise_samples` goes about it: on the first `sample` images, up to `limit` draws.

    `sample` 0 believes the number that is declared.
    """

    sample: int
    limit: int


@dataclass(frozen=True)
class Samples:
    """The number of draws settled on, and every number tried: JSON values."""

    samples: int
    tried: tuple[dict[str, Any], ...]
    stable: bool | None  # None: nothing was tried


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
    """Double the number of draws until robust accuracy stays within its interval.

    `attack` makes the attack for a number of draws, `declared` is the first. A number is settled on
    when twice as many leave an accuracy not below the 95% Wilson interval of its own; `stable` is
    False where `limit` ends the doubling. Everything is judged like the evaluation itself.
    """
    # Imported here: the package `results` imports this one.
    from robustbench_local.results.statistics import wilson

    if averaging.sample == 0:
        return Samples(declared, (), None)
    rows = torch.arange(min(averaging.sample, len(split)))
    on_device = rows.to(split.labels.device)
    some = Split(split.images[on_device], split.labels[on_device], split.indices[rows])

    def robust(samples: int) -> float:
        outcome = evaluate(oracle, attack(samples), some, batch_size=batch_size, judging=judging)
        correct = float(outcome.examples.robust_correct.sum())
        tried.append({"samples": samples, "robust_accuracy": correct / len(some), "n": len(some)})
        return correct

    tried: list[dict[str, Any]] = []
    samples, correct = declared, robust(declared)
    while 2 * samples <= averaging.limit:
        more = robust(2 * samples)
        if more / len(some) >= wilson(correct, len(some)).low:
            return Samples(samples, tuple(tried), True)
        samples, correct = 2 * samples, more
    return Samples(samples, tuple(tried), False)

"""What a recipe is given at one step of a training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from robustbench_local.types import Images, Labels, Logits

Criterion: TypeAlias = Callable[[Logits, Labels], Tensor]
"""Mean loss of a batch, a scalar: cross-entropy with the schedule's label smoothing."""


@dataclass(frozen=True)
class Step:
    """One step of a training: its minibatch, and where in the training it is.

    `progress` is the share of the training that is over, in [0, 1), `number` counts the steps from
    0, `seed` is that of the whole training.
    """

    x: Images
    y: Labels
    criterion: Criterion
    progress: float
    number: int
    seed: int

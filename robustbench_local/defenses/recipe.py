"""The train-time half of a defense: what loss a training step descends."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

from torch import Tensor

from robustbench_local.training.step import Step
from robustbench_local.types import Logits, Model

if TYPE_CHECKING:
    from robustbench_local.attacks import Attack
    from robustbench_local.threat import ThreatModel
    from robustbench_local.training.workshop import Workshop

Objective: TypeAlias = Callable[[Model], tuple[Tensor, Logits]]
"""The loss of one training step and its logits, as a function of the network alone."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Decides the weights. Subclasses are frozen dataclasses; their fields enter the cache key.

    Fields may be plain values, other dataclasses (an attack, a threat model), and lists or mappings
    of these; those with `compare=False` are no settings. `adversarial` says whether the loss is
    taken on perturbed images; such a recipe names a `validation_attack`, unless its validation
    images are perturbed already.
    """

    adversarial: ClassVar[bool]

    draws_by_image: ClassVar[bool] = False
    """Whether every draw of the loss belongs to the pixels of an image and not to its place in the
    batch, so that processes that train together need no seeds of their own."""

    def prepare(self, workshop: "Workshop") -> Self:
        """Get what the training needs beside the data, such as a teacher. The default: nothing."""
        return self

    def begin(self) -> Self:
        """The recipe for one epoch: whatever a step hands on to the next one starts anew.

        Else a training that was killed, which goes on after a whole epoch, would end elsewhere.
        """
        return self

    @property
    def replays(self) -> int:
        """How many steps in a row train on the same minibatch."""
        return 1

    @abstractmethod
    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """The scalar training loss, and the logits the training accuracy is counted on.

        `model` is in train mode. Every draw must derive from the seed and the number of the step,
        so that a training that was killed goes on as if nothing had happened.
        """

    def objective(self, model: Model, step: Step) -> Objective:
        """`loss` for whoever needs it more than once in a step, at `model` and near it.

        A recipe that looks for perturbed images does so here, once.
        """

        return lambda network: self.loss(network, step)

    def validation_attack(self) -> "tuple[Attack, ThreatModel] | None":
        """What the robust validation accuracy is measured with; None where there is none."""
        return None

    def settled(self, progress: float) -> bool:
        """Whether training is past its warm-up here: until then no patience is lost."""
        return True


@dataclass(frozen=True, kw_only=True)
class Standard(Recipe):
    """Plain cross-entropy on the images as they are: no defense."""

    adversarial: ClassVar[bool] = False

    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`."""
        logits: Logits = model(step.x)
        return step.criterion(logits, step.y), logits

"""Defensive distillation: a softmax so hot in training that it is saturated at run time."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_local.defenses.recipe import Recipe
from robustbench_local.defenses.settings import read_number
from robustbench_local.randomness import derive_seed, reseed
from robustbench_local.training.step import Step
from robustbench_local.types import Logits, Model

if TYPE_CHECKING:
    from robustbench_local.training.workshop import Workshop


@dataclass(frozen=True, kw_only=True)
class Heated(Recipe):
    """Plain training with the logits divided by `temperature`: how the teacher learns.

    The loss is multiplied by it, or gradient descent at a learning rate and a weight decay meant
    for plain training learns nothing; the paper does not say.
    """

    adversarial: ClassVar[bool] = False

    temperature: float

    def __post_init__(self) -> None:
        temperature = read_number(
            "defense.recipe.distillation.temperature",
            self.temperature,
            fits=lambda temperature: 1 <= temperature <= 1000,
            expected="a number from 1 to 1000",
            example=100,
        )
        object.__setattr__(self, "temperature", temperature)

    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`."""
        logits: Logits = model(step.x)
        return self.temperature * step.criterion(logits / self.temperature, step.y), logits


@dataclass(frozen=True, kw_only=True)
class Distillation(Heated):
    """Defensive distillation (Papernot et al. 2016, arXiv:1511.04508).

    A teacher of the same architecture is trained on the labels at this `temperature`, then the
    network on the teacher's probabilities at the same temperature; at run time it is 1. That
    multiplies the logits, and the softmax saturates: the gradient of its cross-entropy is 0 in
    float32, which stops attacks that climb it. Those that climb logits break the network like an
    undefended one (Carlini and Wagner 2016, arXiv:1607.04311): there is no robustness here.

    Where the network is trained behind wraps, so is the teacher, which is then asked behind them.
    """

    teacher: tuple[Model, ...] = field(default=(), repr=False, compare=False)

    def prepare(self, workshop: "Workshop") -> Self:
        """Train the teacher, or take it from the cache."""
        taught = workshop.classifier(Heated(temperature=self.temperature)).model
        teacher = taught if workshop.through is None else workshop.through(taught)
        return replace(self, teacher=(teacher.eval().requires_grad_(False),))

    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """Cross-entropy with what the teacher says; labels and label smoothing play no part."""
        if not self.teacher:
            raise RuntimeError("no teacher yet; expected prepare(workshop) before training")
        (teacher,) = self.teacher
        reseed(teacher, derive_seed(step.seed, "teacher", step.number))
        with torch.no_grad():
            said = (teacher(step.x) / self.temperature).softmax(1)
        logits: Logits = model(step.x)
        return self.temperature * F.cross_entropy(logits / self.temperature, said), logits

"""Training at adversarially perturbed weights, on top of any recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustbench_local import processes
from robustbench_local.attacks import Attack
from robustbench_local.defenses.recipe import Recipe
from robustbench_local.defenses.settings import read_number
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Step
from robustbench_local.types import Images, Logits, Model

if TYPE_CHECKING:
    from robustbench_local.training.workshop import Workshop


@dataclass(frozen=True, kw_only=True)
class AWP:
    """Puts adversarial weight perturbation (Wu et al. 2020, arXiv:2004.05884) on top of a recipe.

    `gamma` is the size of the perturbation of each weight matrix and each bank of filters, as a
    fraction of its own (Frobenius) norm. Biases and the scales of batch normalisation stay.
    """

    gamma: float

    def __post_init__(self) -> None:
        gamma = read_number(
            "defense.regularize.awp.gamma",
            self.gamma,
            fits=lambda gamma: 0 < gamma < 1,
            expected="a fraction of the weights' own size, between 0 and 1",
            example=0.005,
        )
        object.__setattr__(self, "gamma", gamma)

    def __call__(self, recipe: Recipe) -> Recipe:
        """The strengthened recipe."""
        return WeightPerturbed(recipe=recipe, gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class WeightPerturbed(Recipe):
    """A recipe whose loss is taken at w + v, where v is one step up the loss from the weights w.

    The perturbed images are found at w and serve both passes. The offset v is a constant, so going
    backward gives w the gradient found at w + v, and there is nothing to put back.

    Deviations from the authors' code: batch statistics are taken from the pass at w, not from that
    at w + v; and v follows the loss of the recipe, as in the paper, for every recipe.
    """

    recipe: Recipe
    gamma: float

    @property
    def adversarial(self) -> bool:  # type: ignore[override]
        """Whether the recipe below trains on perturbed images."""
        return self.recipe.adversarial

    @property
    def draws_by_image(self) -> bool:  # type: ignore[override]
        """See `Recipe.draws_by_image`."""
        return self.recipe.draws_by_image

    @property
    def replays(self) -> int:
        """See `Recipe.replays`."""
        return self.recipe.replays

    def prepare(self, workshop: "Workshop") -> Self:
        """See `Recipe.prepare`."""
        return replace(self, recipe=self.recipe.prepare(workshop))

    def begin(self) -> Self:
        """See `Recipe.begin`."""
        return replace(self, recipe=self.recipe.begin())

    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`."""
        objective = self.recipe.objective(model, step)
        loss, _ = objective(model)
        return objective(Perturbed(model, worst_offset(model, loss, self.gamma)))

    def validation_attack(self) -> tuple[Attack, ThreatModel] | None:
        """See `Recipe.validation_attack`."""
        return self.recipe.validation_attack()

    def settled(self, progress: float) -> bool:
        """See `Recipe.settled`."""
        return self.recipe.settled(progress)


SCALE = 2.0**10
"""A power of two, so that nothing is rounded; a mean loss times this is far from overflow."""


def worst_offset(model: nn.Module, loss: Tensor, gamma: float) -> dict[str, Tensor]:
    """For each matrix of weights, by name: gamma * |w| * g / |g|, with g the gradient of `loss`.

    The loss is scaled, which does not show in g / |g|: in float16 small gradients would become 0.
    """
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dim() > 1
    }
    found = torch.autograd.grad(SCALE * loss, list(weights.values()), allow_unused=True)
    # An entry that overflows all the same moves no weight, lest all become NaN.
    gradients = [each if each is None else each.nan_to_num(0, 0, 0) for each in found]
    if (group := processes.current()) is not None:
        # Of the whole batch: every process perturbs the weights alike, as one alone would.
        group.average([each for each in gradients if each is not None])
    return {
        name: gradient * (gamma * weight.detach().norm() / gradient.norm().clamp(min=1e-30))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        if gradient is not None
    }


class Perturbed(nn.Module):
    """A model with constant offsets added to some of its weights, and buffers of its own."""

    def __init__(self, model: Model, offset: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._offset = dict(offset)
        self._buffers_apart = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def forward(self, x: Images) -> Logits:
        """The logits of the model at the perturbed weights, differentiable in the weights."""
        weights = dict(self.model.named_parameters())
        moved = {name: weights[name] + offset for name, offset in self._offset.items()}
        logits: Logits = functional_call(self.model, {**moved, **self._buffers_apart}, x)
        return logits

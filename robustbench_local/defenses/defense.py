"""A defense: at most one recipe, and any number of wraps in order."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from torch import nn

from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.recipe import Recipe, Standard
from robustbench_local.errors import UserError
from robustbench_local.gradients import is_randomized
from robustbench_local.randomness import derive_seed
from robustbench_local.types import Images, Logits, Model

Wrapper: TypeAlias = Callable[[Model], Model]
"""Builds the defended model around a model. Where that draws random numbers, the module it returns
has `randomized = True` and `reseed(seed)`, like a `Preprocess`."""


class Wrapped(nn.Module):
    """A model behind a transform of its pixels."""

    def __init__(self, preprocess: Preprocess, model: Model) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.model = model

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K)."""
        logits: Logits = self.model(self.preprocess(x))
        return logits


@dataclass(frozen=True)
class Defense:
    """What protects a model: `recipe` in training, `wrap` at run time. Both are keyed by name.

    The first wrap named is the first applied to the pixels. Raises `UserError` for two recipes.
    """

    recipe: Mapping[str, Recipe] = field(default_factory=dict)
    wrap: Mapping[str, Wrapper | Preprocess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for half in ("recipe", "wrap"):
            for name, part in getattr(self, half).items():
                if not (isinstance(part, Recipe) if half == "recipe" else callable(part)):
                    raise UserError(
                        f"defense.{half}.{name} is a {type(part).__name__}; expected a "
                        f"configuration with _target_: see conf/defense/ for examples"
                    )
        if len(self.recipe) > 1:
            names = list(self.recipe)
            raise UserError(
                f"defense has {len(names)} recipes ({', '.join(names)}) and only one can decide "
                f"the weights; type defense={names[0]}"
            )

    @property
    def name(self) -> str:
        """The names joined by "+", the recipe first; "none" where there are none."""
        return "+".join([*self.recipe, *self.wrap]) or "none"

    @property
    def training_recipe(self) -> Recipe:
        """The recipe, or plain training."""
        return next(iter(self.recipe.values()), Standard())

    def apply(self, model: Model) -> Model:
        """What the attacker faces: `model` itself, inside the wraps.

        Every call makes transforms of its own, so that two victims share no random draws.
        """
        victim = model
        for step in reversed(list(self.wrap.values())):  # the first one named ends up outermost
            if isinstance(step, Preprocess):
                victim = Wrapped(copy.deepcopy(step), victim)
            else:
                victim = step(victim)
        return victim

    def randomized(self, victim: Model) -> bool:
        """Whether any part of the victim draws random numbers."""
        return is_randomized(victim)

    def reseed(self, victim: Model, seed: int) -> None:
        """Start the draws of every randomised part anew, each from a seed of its own."""
        parts = [part for part in victim.modules() if hasattr(part, "reseed")]
        for number, part in enumerate(parts):
            part.reseed(derive_seed(seed, "wrap", number))  # type: ignore[operator]

    def reseeder(self, victim: Model) -> Callable[[int], None]:
        """`reseed` for this victim, as a function of the seed."""
        return partial(self.reseed, victim)

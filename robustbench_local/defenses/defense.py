"""A defense: at most one recipe, what strengthens it, and any number of wraps in order."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.recipe import Recipe, Standard
from robustbench_local.errors import UserError
from robustbench_local.gradients import is_randomized
from robustbench_local.own_classes import takes_one
from robustbench_local.randomness import reseed
from robustbench_local.types import Images, Logits, Model

if TYPE_CHECKING:
    from robustbench_local.data import Split
    from robustbench_local.training.workshop import Workshop

Wrapper: TypeAlias = Callable[[Model], Model]
"""Builds the defended model around a model. Where that draws random numbers, the module it returns
has `randomized = True`, `reseed(seed)` and `eot_samples`, like a `Preprocess`. It may have
`in_training`, `at_run_time`, `run_time_only` and `fit` as well, with `check(network)` for what can
be told before that, `through(model)` for what is to be trained where that is not what is deployed,
and `certify(victim, split, seed, progress)`. One that
averages what the model says in several passes says `averages = True`. One that rejects images says
`abstains = True` and has `calibrate(victim, workshop)`, see `Detector`."""

Regularizer: TypeAlias = Callable[[Recipe], Recipe]
"""Makes another recipe of a recipe, such as one that also perturbs the weights."""


_KINDS = {
    "recipe": "a class derived from robustbench_local.defenses.Recipe",
    "regularize": "which can be called with a recipe",
    "wrap": "derived from robustbench_local.defenses.Preprocess or called with a model",
}


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
    """What protects a model: `recipe` in training, `wrap` at run time. All are keyed by name.

    `regularize` holds what goes on top of the recipe. The first wrap named is the first applied to
    the pixels. Raises `UserError` for two recipes.
    """

    recipe: Mapping[str, Recipe] = field(default_factory=dict)
    wrap: Mapping[str, Wrapper | Preprocess] = field(default_factory=dict)
    regularize: Mapping[str, Regularizer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for half in ("recipe", "regularize", "wrap"):
            for name, part in getattr(self, half).items():
                if not (isinstance(part, Recipe) if half == "recipe" else takes_one(part)):
                    raise UserError(
                        f"defense.{half}.{name} is a {type(part).__name__}; expected a "
                        f"configuration with _target_, {_KINDS[half]}: see conf/defense/"
                    )
        if len(self.recipe) > 1:
            names = list(self.recipe)
            raise UserError(
                f"defense has {len(names)} recipes ({', '.join(names)}) and only one can decide "
                f"the weights; type defense={names[0]}"
            )
        self._check_detectors()
        for name in self.faced[1:]:
            if hasattr(self.wrap[name], "certify"):
                others = [each for each in self.names if each != name]
                raise UserError(
                    f"defense.wrap.{name} certifies what comes into it and {self.faced[0]} changes "
                    f"the image before; type defense=[{','.join([name, *others])}]"
                )

    def _check_detectors(self) -> None:
        """One at most, and never averaged: a mean of rejections follows from no score's threshold.

        A wrap that certifies has to come first, so one that averages goes with no detector at all.
        """
        detectors = [name for name, step in self.wrap.items() if _rejects(step)]
        if len(detectors) > 1:
            raise UserError(
                f"defense has {len(detectors)} detectors ({', '.join(detectors)}) and only one can "
                f"decide what is rejected; type defense={detectors[0]}"
            )
        faced = self.faced
        averaging = [name for name in faced if getattr(self.wrap[name], "averages", False)]
        for name in set(detectors) & set(faced):
            rest = [each for each in self.names if each != name]
            if proving := [each for each in averaging if hasattr(self.wrap[each], "certify")]:
                raise UserError(
                    f"defense.wrap.{proving[0]} averages and certifies what comes into it, and "
                    f"defense.wrap.{name} can stand neither behind nor in front of that; type "
                    f"defense=[{','.join(rest)}]"
                )
            if averaging and faced.index(averaging[0]) < faced.index(name):
                rest.insert(rest.index(averaging[0]), name)
                raise UserError(
                    f"defense.wrap.{averaging[0]} averages several passes and defense.wrap.{name} "
                    "behind it sets its threshold on single ones; type "
                    f"defense=[{','.join(rest)}]"
                )

    @property
    def names(self) -> list[str]:
        """The names of all parts, the recipe first."""
        return [*self.recipe, *self.regularize, *self.wrap]

    @property
    def name(self) -> str:
        """The names joined by "+"; "none" where there are none."""
        return "+".join(self.names) or "none"

    @property
    def training_recipe(self) -> Recipe:
        """The recipe, or plain training, with what goes on top of it."""
        recipe = next(iter(self.recipe.values()), Standard())
        for strengthen in self.regularize.values():
            recipe = strengthen(recipe)
        return recipe

    @property
    def trained_through(self) -> list[str]:
        """The names of the wraps that the network is trained behind."""
        return [name for name, step in self.wrap.items() if getattr(step, "in_training", False)]

    @property
    def faced(self) -> list[str]:
        """The names of the wraps that an attacker faces."""
        return [name for name, step in self.wrap.items() if getattr(step, "at_run_time", True)]

    @property
    def abstains(self) -> bool:
        """Whether the victim may reject images, see `robustbench_local.rejection`."""
        return any(_rejects(self.wrap[name]) for name in self.faced)

    def fit(self, workshop: "Workshop") -> "Defense":
        """The same defense with its wraps trained, as far as they learn something themselves.

        Detectors are calibrated last, on the whole victim: what stands in front of them and behind
        them changes their scores.
        """
        fitted = {
            name: step.fit(workshop) if hasattr(step, "fit") else step
            for name, step in self.wrap.items()
        }
        defense = replace(self, wrap=fitted)
        for name, step in fitted.items():
            calibrate = getattr(step, "calibrate", None)
            if calibrate is not None and workshop.network is not None:
                settled = calibrate(defense.apply(workshop.network.model), workshop)
                defense = replace(defense, wrap={**fitted, name: settled})
        return defense

    def apply(self, model: Model) -> Model:
        """What the attacker faces: `model` itself, inside the wraps.

        Every call makes transforms of its own, so that two victims share no random draws.
        """
        return self._inside(model, self.faced, training=False)

    def through(self, model: Model) -> Model:
        """What recipes train: `model` itself, inside the wraps that take part in training."""
        return self._inside(model, self.trained_through, training=True)

    def _inside(self, model: Model, names: list[str], *, training: bool) -> Model:
        for name in reversed(names):  # the first one named ends up outermost
            step = self.wrap[name]
            if isinstance(step, Preprocess):
                model = Wrapped(copy.deepcopy(step), model)
            else:
                around = getattr(step, "through", step) if training else step
                model = around(model)
        return model

    def certify(
        self,
        victim: Model,
        split: "Split",
        *,
        seed: int = 0,
        progress: Callable[[int, float], None] = lambda done, certified: None,
    ) -> Mapping[str, Any] | None:
        """What the first wrap proves of the victim that `apply` made; None where it proves nothing.

        `progress` is called with the images done since its last call and the certified accuracy.
        """
        if not self.certifies:
            return None
        step: Any = self.wrap[self.faced[0]]
        found: Mapping[str, Any] = step.certify(victim, split, seed=seed, progress=progress)
        return found

    @property
    def certifies(self) -> bool:
        """Whether `certify` proves anything."""
        return bool(self.faced) and hasattr(self.wrap[self.faced[0]], "certify")

    @property
    def certified_images(self) -> int | None:
        """How many test images `certify` looks at; None: all."""
        return getattr(self.wrap[self.faced[0]], "images", None) if self.faced else None

    @property
    def learned(self) -> dict[str, dict[str, Any]]:
        """What is known of the trainings of the wraps themselves, by name, once they are fitted."""
        known = {name: getattr(step, "learned", None) for name, step in self.wrap.items()}
        return {name: dict(about) for name, about in known.items() if about}

    def randomized(self, victim: Model) -> bool:
        """Whether any part of the victim draws random numbers."""
        return is_randomized(victim)

    def reseeder(self, victim: Model) -> Callable[[int], None]:
        """`randomness.reseed` for this victim, as a function of the seed."""
        return partial(reseed, victim)


def _rejects(step: object) -> bool:
    return getattr(step, "abstains", False) is True


def declared_samples(victim: Model) -> int:
    """Draws that an attacker averages: the most that a random part of the victim declares."""
    asked = [
        int(getattr(part, "eot_samples", Preprocess.eot_samples))
        for part in victim.modules()
        if getattr(part, "randomized", False) is True
    ]
    return max(asked, default=Preprocess.eot_samples)

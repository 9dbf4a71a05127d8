"""What a part of a defense is given that has to train a network of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from robustbench_local.training.fit import Trained, fit
from robustbench_local.training.schedule import Schedule
from robustbench_local.types import Model

if TYPE_CHECKING:
    from rich.console import Console

    from robustbench_local.data import Dataset
    from robustbench_local.defenses.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Trains networks through the cache, like `fit`, with what all trainings of a run share.

    `build` makes a fresh classifier of the configured architecture, which `model` describes for
    the key of its weights. `network` is the trained classifier; recipes, which come before it,
    find None there.
    """

    data: "Dataset"
    device: torch.device
    cache: Path
    seed: int
    schedule: Schedule
    build: Callable[[], Model]
    model: Mapping[str, object]
    through: Callable[[Model], Model] | None = None
    network: Trained | None = None
    console: "Console | None" = None

    def train(
        self,
        build: Callable[[], Model],
        recipe: "Recipe",
        *,
        key: Mapping[str, object],
        schedule: Schedule | None = None,
        through: Callable[[Model], Model] | None = None,
    ) -> Trained:
        """Train whatever `build` makes; `key` names what decides its weights beside the rest."""
        return fit(
            build,
            self.data,
            recipe,
            schedule or self.schedule,
            seed=self.seed,
            device=self.device,
            cache=self.cache,
            key=key,
            console=self.console,
            through=through,
        )

    def classifier(self, recipe: "Recipe") -> Trained:
        """The configured architecture under a recipe, trained through what the network is."""
        return self.train(self.build, recipe, key=self.model, through=self.through)

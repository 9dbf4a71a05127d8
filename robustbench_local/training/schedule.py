"""How long, how fast and on what a network trains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import torch
from torch import nn

from robustbench_local.errors import UserError

Optimizer = Literal["adamw", "sgd"]
Shape = Literal["one_cycle", "cosine", "step"]
Augmentation = Literal["none", "crop_flip"]

BUDGET = ("threat", "adversarial_steps", "adversarial_step_size")
"""Keys of `cfg.train` that recipes refer to; no part of the schedule, nor of undefended weights."""


@dataclass(frozen=True)
class Plan:
    """A schedule applied to a number of images."""

    epochs: int
    passes: int  # over the training images, in each epoch
    batches: int  # in each pass
    batch_size: int

    @property
    def steps(self) -> int:
        """Optimiser steps of one epoch."""
        return self.passes * self.batches

    @property
    def total(self) -> int:
        """Optimiser steps of the whole training."""
        return self.epochs * self.steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Everything about training that is neither data, model, recipe nor seed.

    - `epochs`; where they come to fewer than `min_steps` steps, as with few images, one epoch
      passes over the images several times.
    - `learning_rate` is the highest; `schedule` its course: `one_cycle` rises linearly from 1/25 of
      it over the share `warmup` of the training and falls to 0 along a cosine (Smith and Topin
      2017, arXiv:1708.07120, without the cycle of the momentum), `cosine` only falls, `step`
      divides by 10 at each of the `milestones` (shares of the training).
    - `momentum` (Nesterov's) of SGD, the first beta of AdamW (Loshchilov and Hutter 2019,
      arXiv:1711.05101).
    - `average_decay`: weights are averaged exponentially (see `Average`); None for not at all.
    - `patience`: training ends after so many epochs in a row that were no better than the one
      selected before them, see `Course`: once it overfits (Rice et al. 2020, arXiv:2002.11569) or
      has collapsed. None for never.
    - `augmentation`: `crop_flip` shifts by up to 4 pixels and mirrors.
    - `mixed_precision` counts on CUDA only.

    Raises `UserError` for values out of range.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    min_steps: int = 0
    optimizer: Optimizer = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Shape = "one_cycle"
    warmup: float = 0.4
    milestones: Sequence[float] = (0.5, 0.75)
    label_smoothing: float = 0.0
    average_decay: float | None = None
    patience: int | None = None
    augmentation: Augmentation = "none"
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        self._check_kinds()
        object.__setattr__(self, "milestones", tuple(self.milestones))
        average = 0.0 if self.average_decay is None else self.average_decay
        ranges: tuple[tuple[str, bool, str], ...] = (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("min_steps", self.min_steps >= 0, "0 or more"),
            ("learning_rate", self.learning_rate > 0, "a number above 0"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup", 0 <= self.warmup < 1, "a share from 0 to below 1"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "shares between 0 and 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a number from 0 to below 1"),
            ("average_decay", 0 <= average < 1, "null or a number from 0 to below 1"),
            ("patience", self.patience is None or self.patience >= 1, "null or 1 or more"),
            ("optimizer", *_one_of(self.optimizer, Optimizer)),
            ("schedule", *_one_of(self.schedule, Shape)),
            ("augmentation", *_one_of(self.augmentation, Augmentation)),
        )
        for name, fine, expected in ranges:
            if not fine:
                raise UserError(f"train.{name}={getattr(self, name)}; expected {expected}")

    def _check_kinds(self) -> None:
        numbers = ("learning_rate", "momentum", "weight_decay", "warmup", "label_smoothing")
        for names, kind, expected in (
            (("epochs", "batch_size", "min_steps", "patience"), int, "a whole number"),
            ((*numbers, "average_decay"), int | float, "a number"),
            (("mixed_precision",), bool, "true or false"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is None and name in ("patience", "average_decay"):
                    continue
                if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                    raise UserError(f"train.{name}={value}; expected {expected}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The schedule of a resolved `cfg.train`, without the training budget of recipes.

        Raises `UserError` for a key that is unknown and one that is missing.
        """
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in config.items() if name not in BUDGET}
        unknown = sorted(set(given) - known)
        if unknown:
            raise UserError(
                f"train.{unknown[0]} is unknown; expected one of {', '.join(sorted(known))}"
            )
        try:
            return cls(**given)
        except TypeError as error:
            raise UserError(
                f"train cannot be read ({error}); expected the keys of conf/train/mnist.yaml"
            ) from error

    def plan(self, images: int) -> Plan:
        """How many steps that is for so many images. The last, short batch is left out."""
        batch_size = min(self.batch_size, images)
        batches = images // batch_size
        passes = max(1, math.ceil(self.min_steps / (self.epochs * batches)))
        return Plan(self.epochs, passes, batches, batch_size)

    def rate(self, progress: float) -> float:
        """The learning rate when the share `progress` of the training, in [0, 1], is over."""
        if self.schedule == "step":
            passed = sum(progress >= milestone for milestone in self.milestones)
            return self.learning_rate * 0.1**passed
        start = self.warmup if self.schedule == "one_cycle" else 0.0
        if progress < start:
            return self.learning_rate * (1 / 25 + (1 - 1 / 25) * progress / start)
        fall = (progress - start) / (1 - start)
        return self.learning_rate * (1 + math.cos(math.pi * fall)) / 2

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of this schedule; the loop sets its learning rate at every step."""
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                weights,
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                nesterov=self.momentum > 0,
            )
        return torch.optim.AdamW(
            weights,
            lr=self.learning_rate,
            betas=(self.momentum, 0.999),
            weight_decay=self.weight_decay,
        )


def _one_of(value: str, choices: Any) -> tuple[bool, str]:
    names = get_args(choices)
    return value in names, f"one of {', '.join(names)}"

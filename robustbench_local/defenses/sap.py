"""Activations dropped at random at run time, the small ones more often."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_local.defenses.preprocess import Seeded
from robustbench_local.defenses.rse import own_parts, places
from robustbench_local.defenses.settings import read_number, require_count
from robustbench_local.errors import UserError
from robustbench_local.types import Images, Logits, Model

_KEY = "defense.wrap.sap"


class PrunedLayers(Seeded):
    """A model that meets pruned activations at the entrance of every layer but the first.

    Hooks do the work, for the time of a pass only; see `rse.NoisyLayers`.
    """

    randomized = True

    def __init__(self, model: Model, *, samples: float, eot_samples: int) -> None:
        super().__init__()
        if len(_layers(model)) < 2:
            raise UserError(
                "defense sap prunes what comes into the second and every later convolution or "
                "linear layer and the model has no such layer; choose another model or defense=rse"
            )
        self.model = model
        self.samples = samples
        self.eot_samples = eot_samples

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K); each image has its own draws."""
        with self._pruning():
            logits: Logits = self.model(x)
        return logits

    @contextmanager
    def _pruning(self) -> Iterator[None]:
        place = places()

        def prune(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if place(layer) == 0:  # pixels are no activations
                return None
            return (self._pruned(inputs[0]), *inputs[1:])

        hooks = [layer.register_forward_pre_hook(prune) for layer in _layers(self.model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pruned(self, activations: Tensor) -> Tensor:
        flat = activations.detach().flatten(1).abs()
        count = max(1, round(self.samples * flat.shape[1]))
        total = flat.sum(1, keepdim=True)
        # Without any activation there is nothing to choose from, nor to drop.
        share = torch.where(total > 0, flat / total.clamp(min=1e-30), 1 / flat.shape[1])
        drawn = share.multinomial(count, replacement=True, generator=self.generator(flat.device))
        kept = torch.zeros_like(flat).scatter_(1, drawn, 1.0)
        # The probability of being drawn at least once: its inverse keeps the expectation.
        chance = -torch.expm1(count * torch.log1p(-share.clamp(max=1 - 1e-7)))
        factor = torch.where(kept > 0, 1 / chance.clamp(min=1e-30), 0.0)
        return activations * factor.view_as(activations)


def _layers(model: Model) -> list[nn.Module]:
    return [part for part in own_parts(model) if isinstance(part, nn.Conv2d | nn.Linear)]


@dataclass(frozen=True, kw_only=True)
class SAP:
    """Stochastic activation pruning (Dhillon et al. 2018, arXiv:1803.01442), at run time only.

    At the entrance of every convolution and linear layer but the first, `samples` times as many
    activations as there are are drawn with replacement, in proportion to their size; those never
    drawn become 0, the others are divided by their probability of being drawn, so that the mean
    stays. The gradient takes the factors as given. `eot_samples`: passes that an attacker averages.

    EOT took it to 0% (Athalye et al. 2018, arXiv:1802.00420). Raises `UserError` for values out of
    range and for a model with fewer than two such layers.
    """

    samples: float = 1.0
    eot_samples: int = 20

    def __post_init__(self) -> None:
        value = read_number(
            f"{_KEY}.samples",
            self.samples,
            fits=lambda value: value > 0,
            expected="a multiple of the number of activations, above 0",
            example=1,
        )
        object.__setattr__(self, "samples", value)
        require_count(f"{_KEY}.eot_samples", self.eot_samples, example=20)

    def __call__(self, model: Model) -> Model:
        """What is deployed."""
        return PrunedLayers(model, samples=self.samples, eot_samples=self.eot_samples)

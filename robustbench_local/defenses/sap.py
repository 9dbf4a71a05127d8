"""Activations dropped at random at run time, the small ones more often."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustbench_local.defenses.layers import RandomLayers, own_parts
from robustbench_local.defenses.settings import read_number, require_count
from robustbench_local.errors import UserError
from robustbench_local.types import Model

_KEY = "defense.wrap.sap"


class PrunedLayers(RandomLayers):
    """A model that meets pruned activations at the entrance of every layer but the first."""

    def __init__(self, model: Model, *, samples: float, eot_samples: int) -> None:
        super().__init__(model, eot_samples=eot_samples)
        if len(self.layers()) < 2:
            raise UserError(
                "defense sap prunes what comes into the second and every later convolution or "
                "linear layer and the model has no such layer; choose another model or defense=rse"
            )
        self.samples = samples

    def layers(self) -> Sequence[nn.Module]:
        """See `RandomLayers.layers`."""
        parts = own_parts(self.model)
        return [part for part in parts if isinstance(part, nn.Conv2d | nn.Linear)]

    def change(self, entering: Tensor, place: int) -> Tensor:
        """See `RandomLayers.change`; pixels are no activations."""
        return entering if place == 0 else self._pruned(entering)

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

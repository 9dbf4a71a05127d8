"""Decoupled direction and norm: the gradient gives the direction, success the length."""

from dataclasses import dataclass
from math import cos, pi
from typing import ClassVar

import torch

from robustbench_local.attacks.base import require_count
from robustbench_local.attacks.minimum_norm import (
    MinimumNorm,
    Nearest,
    diameter,
    feasible,
    require_positive,
    unit,
)
from robustbench_local.errors import UserError
from robustbench_local.gradients import input_gradient
from robustbench_local.randomness import derive_seed
from robustbench_local.types import Images, Norm


@dataclass(frozen=True, kw_only=True)
class DDN(MinimumNorm):
    """Decoupled direction and norm attack (Rony et al. 2019, arXiv:1811.09600) for l2.

    Each step climbs cross-entropy, then stretches the perturbation to a length that is cut by
    `gamma` while it is adversarial and grows by as much while it is not.

    - `steps`; `initial_norm`, the first length in pixel units; `step_size`, the length of the
      first step, falls to `final_step_size` along half a cosine.
    - `quantize`: round to the 256 values of a stored image after each step, as the paper does. Off
      by default, since no other attack here has to; it needs `boundary_steps=0`.
    - `eot_samples`, `boundary_steps`, `target`: see `PGD`, `MinimumNorm` and `attacks.target`.

    Deviations from the paper: gradient entries that point out of the box left out, a random
    direction where the gradient is zero, the last point looked at too, and `boundary_steps`.
    """

    norms: ClassVar[frozenset[Norm]] = frozenset({"l2"})

    steps: int = 1000
    initial_norm: float = 1.0
    step_size: float = 1.0
    final_step_size: float = 0.01
    gamma: float = 0.05
    quantize: bool = False
    eot_samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "eot_samples"):
            require_count(name, getattr(self, name))
        for name in ("initial_norm", "step_size", "final_step_size"):
            require_positive(name, getattr(self, name))
        require_positive("gamma", self.gamma, below=1)
        if self.quantize and self.boundary_steps:
            raise UserError(
                f"attack.boundary_steps={self.boundary_steps} would leave the stored values that "
                "attack.quantize=true asks for; type attack.boundary_steps=0"
            )

    def search(self, held: Nearest) -> None:
        """One descent from the image itself."""
        x, x_adv = held.x, held.x
        # Clipping shortens what was stretched, so the nominal length may exceed the box's diameter.
        longest = 100 * diameter(held.threat, x)
        length = x.new_full((len(x), 1, 1, 1), self.initial_norm)
        for step in range(self.steps):
            fall = (1 + cos(pi * step / self.steps)) / 2
            stride = self.final_step_size + (self.step_size - self.final_step_size) * fall
            look = input_gradient(
                held.model, x_adv, held.y,
                eot_samples=self.eot_samples, targeted=held.targeted,
            )  # fmt: skip
            fooled = held.offer(x_adv, ~look.resists)
            change = torch.where(fooled, 1 - self.gamma, 1 + self.gamma).to(x.dtype)
            length = (length * change.view(-1, 1, 1, 1)).clamp(max=longest)
            gradient = feasible(look.gradient, x_adv)
            move = unit(gradient, x, derive_seed(self.seed, "ddn", step))
            delta = x_adv - x + stride * move
            size = delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            x_adv = self._stored((x + delta * (length / size)).clamp(0, 1))
        everyone = torch.arange(len(x), device=x.device)
        held.offer(x_adv, held.fools(x_adv, everyone))

    def _stored(self, x_adv: Images) -> Images:
        return (x_adv * 255).round() / 255 if self.quantize else x_adv

"""Carlini and Wagner's l2 attack: distance and margin traded off by a constant."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.attacks.base import require_count
from robustbench_local.attacks.minimum_norm import MinimumNorm, Nearest, require_positive
from robustbench_local.errors import UserError
from robustbench_local.gradients import input_gradient
from robustbench_local.types import Images, Norm

_SHRINK = 1 - 5e-3
"""Pixels at exactly 0 and 1 have no finite arctanh, and just beside it no gradient worth the name.
So the search starts this much nearer to grey, at most 0.0025 away from the image."""

_ADAM = (0.9, 0.999, 1e-12)
"""Adam's usual decays. Its usual 1e-8 is added to gradients that may be smaller here."""


@dataclass(frozen=True, kw_only=True)
class CW(MinimumNorm):
    """Carlini and Wagner's attack (2017, arXiv:1608.04644) for l2.

    Minimises squared distance plus a constant times the missing margin, over arctanh of the pixels,
    with Adam; the constant of each image is bisected, since the smallest that succeeds gives the
    nearest image.

    - `steps` for each constant, at the learning rate `step_size`. `early_abort`: an image whose
      objective has not fallen by 0.01% since the last tenth of the steps goes on to its next
      constant.
    - `binary_search_steps` constants, the first one `initial_const`; ten times the last one until
      one succeeds, halving the interval after that.
    - `confidence`: the margin asked for, in units of the logits. Against a randomised victim some
      is needed: at a margin of 0 half of the draws are still right.
    - `eot_samples`, `boundary_steps`, `target`: see `PGD`, `MinimumNorm` and `attacks.target`. A
      `confidence` above 0 needs `boundary_steps=0`, which would give the margin back.

    Deviations from the paper: 1,000 steps by default instead of 10,000, the arctanh of pixels
    shrunk by 0.5% instead of 0.0001% (pixels at 0 and 1 would not move), distances measured from
    the image itself, a smaller constant in Adam's denominator, and `boundary_steps`.
    """

    norms: ClassVar[frozenset[Norm]] = frozenset({"l2"})

    steps: int = 1000
    step_size: float = 0.01
    binary_search_steps: int = 9
    initial_const: float = 1e-3
    confidence: float = 0.0
    early_abort: bool = True
    eot_samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "binary_search_steps", "eot_samples"):
            require_count(name, getattr(self, name))
        for name in ("step_size", "initial_const"):
            require_positive(name, getattr(self, name))
        if not self.confidence >= 0:  # also NaN
            raise UserError(f"attack.confidence={self.confidence:g}; expected 0 or more")
        if self.confidence and self.boundary_steps:
            raise UserError(
                f"attack.boundary_steps={self.boundary_steps} would give back the margin that "
                f"attack.confidence={self.confidence:g} asks for; type attack.boundary_steps=0"
            )

    def search(self, held: Nearest) -> None:
        """Bisect the constant of every image."""
        const = held.size.new_full((len(held.x),), self.initial_const)
        low, high = torch.zeros_like(const), torch.full_like(const, torch.inf)
        for _ in range(self.binary_search_steps):
            solved = self._minimise(held, const.to(held.x.dtype))
            high = torch.where(solved, high.minimum(const), high)
            low = torch.where(solved, low, low.maximum(const))
            const = torch.where(high.isfinite(), (low + high) / 2, const * 10)

    def _minimise(self, held: Nearest, const: Tensor) -> Tensor:
        """Offer the points met on the way down; whether any of them succeeded, shape (N,)."""
        solved = torch.zeros_like(const, dtype=torch.bool)
        rows = torch.arange(len(const), device=const.device)
        w = torch.atanh((2 * held.x - 1) * _SHRINK)
        state = torch.zeros_like(w), torch.zeros_like(w)
        before = torch.full_like(const, torch.inf)
        for step in range(self.steps):
            x, weight = held.x[rows], const[rows]
            x_adv = (w.tanh() + 1) / 2
            look = input_gradient(
                held.model, x_adv, held.y[rows],
                loss="margin", eot_samples=self.eot_samples, targeted=held.targeted,
            )  # fmt: skip
            enough = look.loss >= self.confidence
            fooled = held.offer(x_adv, ~look.resists & enough, rows)
            solved[rows[fooled]] = True

            delta = x_adv - x
            pull = (weight * ~enough / self.eot_samples).view(-1, 1, 1, 1)
            slope = (2 * delta - pull * look.gradient) * 2 * x_adv * (1 - x_adv)
            w, state = _adam(w, slope, state, step, self.step_size)

            if self.early_abort and step % max(1, self.steps // 10) == 0:
                lack = (self.confidence - look.loss).clamp(min=0)
                objective = delta.flatten(1).square().sum(1) + weight * lack
                falling = objective <= 0.9999 * before[rows]
                before[rows] = objective
                going = falling.nonzero().squeeze(1)
                if len(going) == 0:
                    break
                if len(going) < len(rows):
                    rows, w = rows[going], w[going]
                    state = state[0][going], state[1][going]
        return solved


def _adam(
    w: Images, slope: Tensor, state: tuple[Tensor, Tensor], step: int, rate: float
) -> tuple[Images, tuple[Tensor, Tensor]]:
    """One step of Adam (Kingma and Ba 2015, arXiv:1412.6980), each image by itself."""
    first, second, guard = _ADAM
    mean = state[0] * first + slope * (1 - first)
    square = state[1] * second + slope.square() * (1 - second)
    corrected = (square / (1 - second ** (step + 1))).sqrt()
    return w - rate * mean / (1 - first ** (step + 1)) / (corrected + guard), (mean, square)

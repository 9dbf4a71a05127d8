"""Projected gradient descent for l1 with steps on the steepest entries alone."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.attacks.gradient import PGD
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Norm


@dataclass(frozen=True, kw_only=True)
class SparseL1Descent(PGD):
    """Sparse l1 descent, SLIDE (Tramer and Boneh 2019, arXiv:1904.13000).

    Each step goes to the entries whose gradient is at or above the quantile `sparsity` in
    magnitude, the same distance along the sign of each, `step_size` times epsilon in all. The other
    hyper-parameters are those of `PGD`; the defaults are CleverHans' (20 steps of epsilon / 10, the
    99th percentile, no random start).

    Deviations from the paper: entries that the box lets go no further take no part, nor do
    gradients of exactly 0, and the projection is the exact one onto ball and box together (both
    only make it stronger); `best_iterate` and `early_stop` as in `PGD`.
    """

    norms: ClassVar[frozenset[Norm]] = frozenset({"l1"})

    steps: int = 20
    random_start: bool = False
    sparsity: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sparsity, bool) or not 0 <= self.sparsity <= 1:
            raise UserError(
                f"attack.sparsity={self.sparsity}; expected the share of entries a step leaves "
                "alone, from 0 to 1, type for example attack.sparsity=0.99"
            )

    def direction(
        self,
        threat: ThreatModel,
        gradient: Tensor,
        x_adv: Images,
        stride: Tensor,
        *,
        progress: float,
    ) -> Tensor:
        """Equal shares along the sign of the steepest entries, together of unit size."""
        free = torch.where(gradient > 0, x_adv < 1, x_adv > 0)
        steep = (gradient.abs() * free).flatten(1)
        entries = steep.shape[1]
        # As many as are at or above the interpolated quantile where no two are equal.
        count = entries - ceil(round(self.sparsity * (entries - 1), 6))
        least = steep.topk(count, dim=1).values[:, -1:]
        chosen = (steep >= least) & (steep > 0)
        share = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
        return share.to(gradient.dtype).view_as(gradient) * gradient.sign()

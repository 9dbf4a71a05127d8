"""Several models as one."""

from collections.abc import Iterable

import torch
from torch import nn

from robustbench_local.types import Images, Logits


class Ensemble(nn.Module):
    """The mean of the logits of several models.

    Of the ways to combine models the one that transferred best in Dong et al. 2018
    (arXiv:1710.06081). With `abstains` the last logit is that of rejection.
    """

    def __init__(self, models: Iterable[nn.Module], *, abstains: bool = False) -> None:
        super().__init__()
        self.abstains = abstains
        self.models = nn.ModuleList(models)

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K)."""
        return torch.stack([model(x) for model in self.models]).mean(0)

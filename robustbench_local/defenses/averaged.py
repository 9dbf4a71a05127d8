"""Several draws of a randomised model, and the mean of what they say."""

import math

import torch
from torch import nn

from robustbench_local.gradients import images_at_once
from robustbench_local.types import Images, Logits, Model

LEAST_LOOKS = 2
"""An attacker always averages so many looks at least: one of a random victim proves nothing."""


class Averaged(nn.Module):
    """A model that draws random numbers, its probabilities averaged over `draws` passes.

    The answer is the logarithm of the mean probabilities, so attacks find logits. Probabilities and
    not logits are averaged, as in RSE and SmoothAdv: each draw has one vote at most, where a single
    draw with huge logits would outvote all others. Draws that share a pass go through the model as
    one batch, as many as suit the device.
    """

    def __init__(self, model: Model, *, draws: int) -> None:
        super().__init__()
        self.model = model
        self.draws = draws

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to the logarithm of mean probabilities (N, K)."""
        together = max(1, images_at_once(x) // max(1, len(x)))
        said = []
        for first in range(0, self.draws, together):
            count = min(together, self.draws - first)
            logits: Logits = self.model(x.repeat(count, 1, 1, 1))
            said.append(logits.log_softmax(1).view(count, len(x), -1))
        return torch.cat(said).logsumexp(0) - math.log(self.draws)


def looks(eot_samples: int, draws: int) -> int:
    """Looks that an attacker averages at a victim that itself averages `draws` of `eot_samples`."""
    return max(LEAST_LOOKS, -(-eot_samples // draws))

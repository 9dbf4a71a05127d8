"""Fully connected layers."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

from robustbench_local.types import Images, Logits


class MLP(nn.Module):
    """Linear layers with ReLU between them; `hidden` are the widths, none for a linear model."""

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        hidden: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        widths = [prod(input_shape), *hidden, num_classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for inner, outer in pairwise(widths):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Images) -> Logits:
        """Normalised images (N, C, H, W) to logits (N, K)."""
        logits: Logits = self.layers(x)
        return logits

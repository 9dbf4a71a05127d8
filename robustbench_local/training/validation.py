"""How good the weights of an epoch are, measured on held-out training images."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustbench_local.gradients import is_correct
from robustbench_local.types import Model

if TYPE_CHECKING:
    from robustbench_local.attacks import Attack
    from robustbench_local.data import Split
    from robustbench_local.threat import ThreatModel

BATCH = 500
ROBUST_IMAGES = 1000
"""Robust accuracy is measured on so many images at most, evenly spread over the split."""


def correct_images(model: Model, split: "Split") -> Tensor:
    """Which images the model, in eval mode, classifies correctly; bool (N,), on the device."""
    model.eval()
    with torch.no_grad():
        found = [
            is_correct(model(split.pixels(part)), split.labels[part])
            for part in _slices(len(split))
        ]
    return torch.cat(found)


def robust_accuracy(model: Model, split: "Split", attack: "Attack", threat: "ThreatModel") -> float:
    """The share of images correct before and after the attack, of at most `ROBUST_IMAGES`."""
    device = split.labels.device
    count = min(len(split), ROBUST_IMAGES)
    chosen = torch.arange(count, device=device) * len(split) // count
    robust = torch.zeros((), dtype=torch.int64, device=device)
    model.eval()
    for part in _slices(count):
        x, y = split.pixels(chosen[part]), split.labels[chosen[part]]
        with torch.no_grad():
            keep = is_correct(model(x), y)
        x, y = x[keep], y[keep]  # attack only what is correct
        if len(x):
            x_adv = attack(model, x, y, threat)
            with torch.no_grad():
                robust += is_correct(model(x_adv), y).sum()
    return int(robust) / count


def _slices(count: int) -> list[slice]:
    return [slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]

"""Normalisation as the first layer, so that everything outside speaks pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustbench_local.errors import UserError
from robustbench_local.types import Images, Logits, Model


class Normalize(nn.Module):
    """(pixels - mean) / std, per channel; both are buffers and travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Images) -> Tensor:
        """Pixels in [0, 1] to normalised values, same shape."""
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    """A network that takes pixels in [0, 1]: `normalize`, then `network`.

    `mean` and `std` have one value per channel, or one for all of them. Raises `UserError` for
    anything else and for a `std` that is not above 0.
    """

    def __init__(
        self, network: Model, mean: Sequence[float], std: Sequence[float], *, channels: int
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"model.{name}={list(values)} has {len(values)} values and the images have "
                    f"{channels} channels; expected one value, or one per channel"
                )
        if not all(value > 0 for value in std):
            raise UserError(f"model.std={list(std)}; expected numbers above 0")
        self.normalize = Normalize(mean, std)
        self.network = network
        if getattr(network, "channels_last", False):
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K)."""
        logits: Logits = self.network(self.normalize(x))
        return logits


def pixel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in [0, 1], of uint8 images (N, C, H, W).

    Exact whatever the number of images: computed from the counts of the 256 values in float64. A
    channel that is constant gets a standard deviation of 1.
    """
    value = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        count = torch.bincount(images[:, channel].reshape(-1), minlength=256).cpu().double()
        share = count / count.sum()
        centre = float((share * value).sum())
        spread = float((share * (value - centre).square()).sum().sqrt())
        mean.append(centre)
        std.append(spread if spread > 1e-6 else 1.0)
    return mean, std

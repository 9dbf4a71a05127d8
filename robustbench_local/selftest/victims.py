"""Victims of which everything is known."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_local.types import Images, Logits


class LinearVictim(nn.Module):
    """logits = weight @ pixels + bias, in float64 so that rounding decides nothing.

    `weight` is (K, C*H*W), `bias` (K,). The logits are `shift + scale * (...)`, returned in the
    type of the images.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, shift: float = 0, scale: float = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.double())
        self.bias = nn.Parameter(bias.double())
        self.shift = shift
        self.scale = scale

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K)."""
        logits = functional.linear(x.flatten(1).double(), self.weight, self.bias)
        return (self.shift + self.scale * logits).to(x.dtype)


class LogSoftmax(nn.Module):
    """A victim that ends in log-softmax: never a positive output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Images) -> Logits:
        """Log-probabilities of the model."""
        logits: Logits = self.model(x).log_softmax(1)
        return logits


class Masked(nn.Module):
    """A victim that sees `levels` grey values only: the input gradient is zero everywhere."""

    def __init__(self, model: nn.Module, levels: int = 8) -> None:
        super().__init__()
        self.model = model
        self.levels = levels

    def forward(self, x: Images) -> Logits:
        """The model's logits for rounded pixels."""
        logits: Logits = self.model((x * self.levels).round() / self.levels)
        return logits


class NoisyInput(nn.Module):
    """A victim that adds fresh normal noise to every image it sees, from torch's generator."""

    def __init__(self, model: nn.Module, deviation: float) -> None:
        super().__init__()
        self.model = model
        self.deviation = deviation

    def forward(self, x: Images) -> Logits:
        """The model's logits for noisy pixels."""
        logits: Logits = self.model(x + self.deviation * torch.randn_like(x))
        return logits


class DeclaredNoise(NoisyInput):
    """The same, and it says so."""

    randomized = True


class NoisyLogits(nn.Module):
    """A victim whose logits carry fresh normal noise: no gradient is wrong, every score is."""

    def __init__(self, model: nn.Module, deviation: float) -> None:
        super().__init__()
        self.model = model
        self.deviation = deviation

    def forward(self, x: Images) -> Logits:
        """The model's logits, noisy."""
        logits: Logits = self.model(x)
        return logits + self.deviation * torch.randn_like(logits)


class Ridge(nn.Module):
    """Wrong only on a narrow ridge, which a search may step across: class 1 where it is.

    logits (N, 2): the second is above the first where `direction` @ pixels is nearer than `width`
    to `height`.
    """

    def __init__(self, direction: Tensor, height: float, width: float) -> None:
        super().__init__()
        self.direction = nn.Parameter(direction.double())
        self.height, self.width = height, width

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, 2)."""
        off = (x.flatten(1).double() @ self.direction - self.height).abs()
        return torch.stack([off, torch.full_like(off, self.width)], 1).to(x.dtype)


class Raising(nn.Module):
    """A victim that breaks down on its `calls`-th call."""

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.model = model
        self.left = calls

    def forward(self, x: Images) -> Logits:
        """The model's logits, as long as it lasts."""
        self.left -= 1
        if self.left == 0:
            raise BrokenDownError("the victim broke down")
        logits: Logits = self.model(x)
        return logits


class BrokenDownError(RuntimeError):
    """What `Raising` raises."""


class Delicate(nn.Module):
    """A small network with every kind of state that an attack could disturb.

    Dropout, batch norm, and a mixture of modes and flags as fine-tuning leaves it. In float64
    inside, since float32 convolutions of different batch sizes differ by a rounding.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(channels * 100 + classes)
            layers: list[Any] = [
                nn.Conv2d(channels, 6, 3, stride=2),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Flatten(),
                nn.Linear(54, classes),
            ]
            layers[1].running_mean.normal_()
        self.layers = nn.Sequential(*layers).double()
        layers[0].eval().requires_grad_(False)
        layers[1].eval()
        layers[5].weight.grad = torch.ones_like(layers[5].weight)

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, 8, 8), to logits (N, K)."""
        logits: Logits = self.layers(x.double()).to(x.dtype)
        return logits

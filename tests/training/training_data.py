"""Small datasets for the tests of training; no test itself."""

from pathlib import Path

import torch
from torch import Tensor, nn

from robustbench_local.data import MNIST, Dataset, Split, load
from robustbench_local.models import Normalized

CPU = torch.device("cpu")


def make_data(*, train: int = 96, held: int = 60, noise: float = 0.15, seed: int = 0) -> Dataset:
    """Three classes of 1x8x8 images, a bright row each, under noise."""
    generator = torch.Generator().manual_seed(seed)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 3
        x = torch.randn(count, 1, 8, 8, generator=generator) * noise + 0.3
        x[torch.arange(count), 0, 2 * labels + 1] += 0.5
        return Split((x.clamp(0, 1) * 255).to(torch.uint8), labels, torch.arange(count))

    return Dataset(
        name="rows",
        source="files",
        train=split(train),
        validation=split(held),
        test=split(held),
        class_names=("a", "b", "c"),
        test_total=held,
        fingerprint=f"rows-{train}-{held}-{noise}-{seed}",
        test_fingerprint="rows",
        notes=(),
    )


def embedded_mnist() -> Dataset:
    """The real digits that come with a package."""
    return load(MNIST(source="embedded"), Path(), Path(), CPU)


def small_network() -> Normalized:
    """Everything that makes going on hard: batch statistics, dropout, four-dimensional weights."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(256, 3),
    )
    return Normalized(network, [0.3], [0.3], channels=1)


def linear_network() -> Normalized:
    """Starts at zero, so the first step is known."""
    linear = nn.Linear(64, 3)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return Normalized(nn.Sequential(nn.Flatten(), linear), [0], [1], channels=1)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}

"""The defenses of conf/defense, ready to be tested, and a small network; no test itself."""

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from robustbench_local.building import build_defense
from robustbench_local.data import Dataset, Split
from robustbench_local.defenses import Defense, Preprocess
from robustbench_local.gradients import is_randomized
from robustbench_local.training import Schedule, Trained, Workshop

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(path.stem for path in (CONF / "defense").glob("*.yaml"))
CLASSES = 4
CACHE = Path(tempfile.mkdtemp(prefix="contract-"))
"""For parts that train through the cache by themselves; gone when the session ends."""
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def having(part: str) -> list[str]:
    """The files that bring a `recipe`, something to `regularize` with, or a `wrap`."""
    folder = CONF / "defense"
    return [name for name in CHOICES if OmegaConf.load(folder / f"{name}.yaml").get(part)]


RECIPES, REGULARIZERS, WRAPS = having("recipe"), having("regularize"), having("wrap")


@cache
def settings(*choices: str) -> DictConfig:
    """The group `defense` as `defense=[...]` composes it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"defense=[{','.join(choices)}]"]).defense


class Network(nn.Module):
    """Takes images of any size of 7x7 or more; in float64, so that batches of any size agree."""

    def __init__(self, channels: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 8, 3, stride=2),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, stride=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(64, CLASSES),
            ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.double()).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Apprentice(Workshop):
    """Trains nothing: what would be trained comes back as it was made."""

    def train(self, build: Callable[[], nn.Module], *arguments: Any, **options: Any) -> Trained:
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            return Trained.given(build().eval(), "0" * 64)


def workshop(channels: int) -> Apprentice:
    """For parts that learn something: 28x28 images, a finished network, and no training."""

    def split(count: int, seed: int) -> Split:
        pixels = (images(channels, 28, 28, count=count, seed=seed) * 255).round().to(torch.uint8)
        return Split(pixels, torch.arange(count) % CLASSES, torch.arange(count))

    data = Dataset(
        name="tiny",
        source="files",
        train=split(40, 1),
        validation=split(40, 2),
        test=split(8, 3),
        class_names=tuple("abcd"),
        test_total=8,
        fingerprint=f"tiny-{channels}",
        test_fingerprint="tiny",
        notes=(),
    )
    return Apprentice(
        data=data,
        device=torch.device("cpu"),
        cache=CACHE,
        seed=0,
        schedule=Schedule(epochs=1, batch_size=8, learning_rate=0.01),
        build=lambda: Network(channels),
        model={"model": "tiny"},
        network=Trained.given(Network(channels).eval(), "0" * 64),
    )


@cache
def ready(choice: str, channels: int) -> Defense:
    """The defense of a file, with whatever learns something fitted; nobody may change it."""
    return build_defense(settings(choice)).fit(workshop(channels))


def victim_of(defense: Defense, channels: int) -> nn.Module:
    return defense.apply(Network(channels)).eval()


def transforms_of(victim: nn.Module) -> list[Preprocess]:
    return [part for part in victim.modules() if isinstance(part, Preprocess)]


def outputs_of(victim: nn.Module) -> int:
    """One more than the classes where the victim may reject an image."""
    return CLASSES + any(getattr(part, "abstains", False) is True for part in victim.modules())


def images(channels: int, height: int, width: int, *, count: int = 4, seed: int = 0) -> Tensor:
    """Patches and noise, about half of the pixels exactly 0 or 1."""
    generator = torch.Generator().manual_seed(1000 * channels + seed)
    coarse = torch.rand(count, channels, -(-height // 4), -(-width // 4), generator=generator)
    x = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :height, :width]
    noise = torch.rand(x.shape, generator=generator)
    return (2.2 * x - 0.6 + 0.4 * (noise - 0.5)).clamp(0, 1)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((function(x) * weight).sum(), x)
    return gradient


def global_states() -> list[object]:
    """The state of every generator that belongs to nobody, to be compared with `==`."""
    name, keys, *rest = np.random.get_state()
    return [random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()]


def draws(victim: nn.Module) -> bool:
    """Whether the victim says that it is random."""
    return is_randomized(victim)

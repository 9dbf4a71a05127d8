"""Victims whose answer is known, and one small network trained on real digits."""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from robustbench_local.data import MNIST, Dataset, load
from robustbench_local.files import atomic_path
from robustbench_local.selftest.victims import (  # noqa: F401  # tests take them from here
    LinearVictim,
    LogSoftmax,
    Masked,
    NoisyInput,
    NoisyLogits,
    Raising,
)

# On networks this small two threads gain nothing, and where another process has the second core
# they wait for each other: a training step then takes thirty times as long.
torch.set_num_threads(1)


class Double(nn.Module):
    """The network in float64 inside: no sign of a gradient hangs on how a library sums up."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # A copy: `digit_model` stays float32 for the other tests.
        self.model = copy.deepcopy(model).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double())


class Recording(nn.Module):
    """A victim that keeps every image it is shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.model(x)


class Counting(nn.Module):
    """A victim that counts the images it is asked about, itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.model(x)


def digit_cnn(width: int = 16, *, seed: int = 0) -> nn.Sequential:
    """An untrained network for digits: two strided convolutions and two linear layers."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 49, 8 * width),
            nn.ReLU(),
            nn.Linear(8 * width, 10),
        )


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 100,
    seed: int = 0,
) -> nn.Module:
    """Plain training with Adam and a falling step size, on `attack`ed images if one is given."""
    steps = epochs * (len(x) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
            if len(rows) < batch_size:
                continue
            images = x[rows] if attack is None else attack(model, x[rows], y[rows])
            optimizer.zero_grad()
            functional.cross_entropy(model(images), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def plain_pgd(
    model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, step: float, steps: int
) -> Tensor:
    """Madry et al.'s attack in its simplest form, written for training robust test victims."""
    generator = torch.Generator().manual_seed(int(x.sum()))
    x_adv = (x + epsilon * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + step * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    return x_adv


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images whose largest logit is the label's, in [0, 1]."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def what_is_recorded(results: Path | str) -> dict[str, tuple[dict[str, object], bytes]]:
    """What each record says apart from times, and the bytes of what befell each image."""
    found = {}
    for path in sorted(Path(results, "records").glob("*.json")):
        record = json.loads(path.read_text())
        for key in ("checksum", "finished", "seconds"):
            record.pop(key)
        found[path.stem] = record, path.with_suffix(".npz").read_bytes()
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of a benchmark or an ordeal to run: little in CI, more for figures to publish."""
    parser.addoption("--pixel-images", type=int, default=3, help="images of the one-pixel races")
    parser.addoption("--fold-records", type=int, default=20_000, help="records of the large fold")
    parser.addoption("--kills", type=int, default=0, help="processes to kill; 0: a few")


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """What a run inside a test does to the root logger ends with the test.

    At its level ART formats messages that NumPy 2 refuses.
    """
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture(scope="session")
def pixel_images(request: pytest.FixtureRequest) -> int:
    """Images that each library attacks in the one-pixel races."""
    count = request.config.getoption("--pixel-images")
    assert isinstance(count, int)
    return count


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The 5,000 real MNIST images that need no download."""
    folder: Path = tmp_path_factory.mktemp("digits")
    return load(MNIST(source="embedded"), folder, folder, "cpu")


@pytest.fixture(scope="session")
def digit_images(digits: Dataset) -> tuple[Tensor, Tensor]:
    """All 1,000 test images of `digits` as float32 pixels, and their labels, shuffled."""
    order = torch.randperm(len(digits.test), generator=torch.Generator().manual_seed(0))
    return digits.test.pixels(order), digits.test.labels[order]


@pytest.fixture(scope="session")
def digit_model(digits: Dataset, digit_images: tuple[Tensor, Tensor]) -> nn.Module:
    """An undefended network, 95% or more right on the test digits; nobody may change it."""
    x, y = digits.train.pixels(slice(None)), digits.train.labels
    model = train(digit_cnn(), x, y, epochs=6)
    assert accuracy(model, *digit_images) >= 0.95
    return model


@pytest.fixture(scope="session")
def robust_digit_model(
    digits: Dataset, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> nn.Module:
    """A network trained on PGD examples of linf 0.3; about 40 seconds, for slow tests only.

    Kept in pytest's cache, where there is one, under a hash of this file, the images and the
    version of torch: one process trains for all, and for the benchmarks, a command of their own.
    """
    parts = (Path(__file__).read_bytes(), digits.fingerprint.encode(), torch.__version__.encode())
    key = sha256(b"".join(parts)).hexdigest()[:16]
    cache = getattr(request.config, "cache", None)  # not there with -p no:cacheprovider
    name = "robust_digit_model"
    folder = tmp_path_factory.mktemp(name) if cache is None else cache.mkdir(name)
    file = folder / f"{key}.safetensors"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            with atomic_path(file) as temporary:
                save_file(_robust_digit_model(digits).state_dict(), temporary)
    model = digit_cnn(32).eval().requires_grad_(False)
    model.load_state_dict(load_file(file))
    return model


def _robust_digit_model(digits: Dataset) -> nn.Module:
    x, y = digits.train.pixels(slice(None)), digits.train.labels
    epochs = 20
    radii = iter(0.6 * torch.arange(epochs * len(x) // 100) / (epochs * len(x) // 100))

    def attack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        # Straight into 0.3 a small network stays at chance, so the radius grows half the time.
        radius = min(0.3, float(next(radii)))
        return plain_pgd(model, images, labels, epsilon=radius, step=0.7 * radius, steps=3)

    return train(digit_cnn(32), x, y, epochs=epochs, attack=attack)

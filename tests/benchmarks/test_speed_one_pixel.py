"""Images per second of the one-pixel attack beside torchattacks and ART, at equal evolution."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from conftest import Counting, accuracy, digit_cnn, train
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from robustbench_local.attacks import OnePixel
from robustbench_local.data import Dataset
from robustbench_local.models import ResNet
from robustbench_local.threat import ThreatModel

with warnings.catch_warnings():
    # ART imports modules of other libraries that announce their end.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from art.attacks.evasion import PixelAttack
    from art.estimators.classification import PyTorchClassifier

pytestmark = pytest.mark.slow

GENERATIONS = 100
Attack = Callable[[Tensor, Tensor], Tensor]


def population(x: Tensor) -> int:
    """What both libraries make of 400: the largest multiple of the numbers in a candidate."""
    return 400 - 400 % (2 + x.shape[1])


def attacks(model: nn.Module, x: Tensor) -> dict[str, Attack]:
    """Differential evolution of one pixel with equal populations and generations."""
    threat = ThreatModel(norm="l0", epsilon=1, access="scores")
    ours = OnePixel(population=population(x), generations=GENERATIONS)
    theirs = torchattacks.OnePixel(model, pixels=1, steps=GENERATIONS, popsize=400)
    art = PixelAttack(
        PyTorchClassifier(
            model=model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=10,
            clip_values=(0, 1),
            device_type="cpu",
        ),
        th=1,
        es=1,
        max_iter=GENERATIONS,
    )
    return {
        "ours": lambda x, y: ours(model, x, y, threat),
        "torchattacks": theirs,
        "art": lambda x, y: torch.from_numpy(art.generate(x.numpy(), y.numpy())),
    }


@dataclass
class Race:
    """Seconds, forward passes, and the share of the images broken.

    `seconds` are of CPU time, on one thread: on a machine that does other things too, the time
    that passes (`wall`) says more about those.
    """

    seconds: dict[str, float]
    wall: dict[str, float]
    queries: dict[str, int]
    broken: dict[str, float]
    images: int

    def ratio(self, other: str) -> float:
        """How many times as fast we are."""
        return self.seconds[other] / self.seconds["ours"]

    def summary(self) -> dict[str, float]:
        speed = {
            f"images_per_second_{name}": round(self.images / seconds, 3)
            for name, seconds in self.seconds.items()
        }
        ratios = {f"times_{name}": round(self.ratio(name), 3) for name in self.seconds}
        queries = {f"queries_{name}": round(n / self.images) for name, n in self.queries.items()}
        broken = {f"broken_{name}": round(100 * part, 1) for name, part in self.broken.items()}
        wall = {f"wall_{name}": round(seconds, 1) for name, seconds in self.wall.items()}
        return speed | ratios | queries | broken | wall


def race(model: nn.Module, x: Tensor, y: Tensor) -> Race:
    """All attacks on the same images, one after the other."""
    victim = Counting(model).eval()
    seconds, wall, queries, broken = {}, {}, {}, {}
    state = np.random.get_state()
    np.random.seed(0)  # both libraries draw from NumPy's global generator
    for name, runner in attacks(victim, x).items():
        victim.images = 0
        began = time.process_time(), time.perf_counter()
        with np.errstate(divide="ignore"):  # ART, where its whole population is equally good
            x_adv = runner(x, y)
        seconds[name] = time.process_time() - began[0]
        wall[name] = time.perf_counter() - began[1]
        queries[name] = victim.images
        broken[name] = 1 - accuracy(model, x_adv, y)
    np.random.set_state(state)
    return Race(seconds, wall, queries, broken, len(x))


def chosen(model: nn.Module, x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A third of them nearest to another class, the rest from the middle of those it has right.

    The first are what one pixel may turn, the others cost all the time there is.
    """
    close = max(1, count // 3)
    with torch.no_grad():
        logits = model(x)
    margin = logits.gather(1, y[:, None]) - logits.scatter(1, y[:, None], -torch.inf).amax(1, True)
    right = (margin[:, 0] > 0).nonzero().squeeze(1)
    order = right[margin[right, 0].argsort()]
    rows = torch.cat((order[:close], order[len(order) // 2 :][: count - close]))
    return x[rows], y[rows]


def check(result: Race, torchattacks_ratio: float, art_ratio: float) -> None:
    summary = result.summary()
    assert result.broken["ours"] >= max(result.broken.values()), summary
    assert result.queries["ours"] <= min(result.queries.values()), summary
    assert result.ratio("torchattacks") >= torchattacks_ratio, summary
    assert result.ratio("art") >= art_ratio, summary


def test_one_pixel_on_a_digit_network(
    benchmark: BenchmarkFixture,
    digits: Dataset,
    digit_images: tuple[Tensor, Tensor],
    pixel_images: int,
) -> None:
    model = train(digit_cnn(32), digits.train.pixels(slice(None)), digits.train.labels, epochs=6)
    x, y = chosen(model, *digit_images, pixel_images)
    result = benchmark.pedantic(race, args=(model, x, y), rounds=1)
    benchmark.extra_info.update(result.summary())
    check(result, torchattacks_ratio=5, art_ratio=6)


def as_cifar(x: Tensor) -> Tensor:
    """Digits with a black rim and three equal channels."""
    return F.pad(x, (2, 2, 2, 2)).repeat(1, 3, 1, 1)


def test_one_pixel_on_a_residual_network(
    benchmark: BenchmarkFixture,
    digits: Dataset,
    digit_images: tuple[Tensor, Tensor],
    pixel_images: int,
) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = ResNet(input_shape=(3, 32, 32), num_classes=10, depth=8)
    rows = torch.arange(0, len(digits.train), 2)
    x, y = as_cifar(digits.train.pixels(rows)), digits.train.labels[rows]
    train(model, x, y, epochs=4, batch_size=50)
    images, labels = as_cifar(digit_images[0]), digit_images[1]
    assert accuracy(model, images, labels) >= 0.9
    x, y = chosen(model, images, labels, pixel_images)
    result = benchmark.pedantic(race, args=(model, x, y), rounds=1)
    benchmark.extra_info.update(result.summary())
    check(result, torchattacks_ratio=1.8, art_ratio=1.3)

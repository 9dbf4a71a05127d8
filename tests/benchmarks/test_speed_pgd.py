"""Images per second of PGD-40 beside torchattacks, ART and Foolbox: same work, same tensors."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest
import torch
import torchattacks
from conftest import accuracy, digit_cnn, train
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from robustbench_local.attacks import PGD
from robustbench_local.data import Dataset
from robustbench_local.threat import ThreatModel

with warnings.catch_warnings():
    # Both import modules of other libraries that announce their end.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import foolbox
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

pytestmark = pytest.mark.slow

EPSILON, STEP, STEPS, BATCH = 0.3, 0.01, 40, 500

Attack = Callable[[Tensor, Tensor], Tensor]


def attacks(model: nn.Module, *, random_start: bool = True) -> dict[str, Attack]:
    """Every library's PGD with equal settings, built before the clock starts."""
    threat = ThreatModel(norm="linf", epsilon=EPSILON)
    seeds = count()
    torch_pgd = torchattacks.PGD(
        model, eps=EPSILON, alpha=STEP, steps=STEPS, random_start=random_start
    )
    art_pgd = ProjectedGradientDescentPyTorch(
        PyTorchClassifier(
            model=model,
            loss=nn.CrossEntropyLoss(),
            input_shape=(1, 28, 28),
            nb_classes=10,
            clip_values=(0, 1),
            device_type="cpu",
        ),
        norm=np.inf,
        eps=EPSILON,
        eps_step=STEP,
        max_iter=STEPS,
        num_random_init=int(random_start),
        batch_size=BATCH,
        verbose=False,
    )
    foolbox_pgd = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=random_start)
    foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    misclassified = foolbox.criteria.Misclassification
    return {
        "ours": lambda x, y: PGD(
            steps=STEPS, step_size=STEP / EPSILON, random_start=random_start, seed=next(seeds)
        )(model, x, y, threat),
        "torchattacks": torch_pgd,
        "art": lambda x, y: torch.from_numpy(art_pgd.generate(x.numpy(), y.numpy())),
        "foolbox": lambda x, y: foolbox_pgd.run(
            foolbox_model, x, misclassified(y), epsilon=EPSILON
        ),
    }


@dataclass
class Race:
    """CPU seconds of each round; the share of the images each library left correct."""

    seconds: dict[str, list[float]]
    left: dict[str, float]
    images: int

    def ratio(self, other: str) -> float:
        """How many times as fast we are, each at its best: noise only ever adds to a time."""
        return min(self.seconds[other]) / min(self.seconds["ours"])

    def summary(self) -> dict[str, float]:
        speed = {
            f"images_per_second_{name}": round(self.images / min(times))
            for name, times in self.seconds.items()
        }
        ratios = {f"times_{name}": round(self.ratio(name), 3) for name in self.seconds}
        left = {f"robust_{name}": round(100 * value, 2) for name, value in self.left.items()}
        return speed | ratios | left


def race(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> Race:
    """All libraries one after the other, round by round, each round starting with the next one.

    Timed with a random start. The accuracies are compared without one: starts move the result on a
    robust network by half a point either way, more than what there is to see.
    """
    runners = attacks(model)
    names = list(runners)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    left = {}
    for runner in runners.values():  # allocate and import before the clock starts
        runner(x[:8], y[:8])
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.process_time()
            runners[name](x, y)
            seconds[name].append(time.process_time() - began)
    for name, runner in attacks(model, random_start=False).items():
        left[name] = accuracy(model, runner(x, y), y)
    return Race(seconds, left, len(x))


@pytest.fixture(scope="module")
def undefended(digits: Dataset) -> nn.Module:
    x, y = digits.train.pixels(slice(None)), digits.train.labels
    return train(digit_cnn(32), x, y, epochs=6)


def correct_ones(model: nn.Module, digits: Dataset) -> tuple[Tensor, Tensor]:
    """500 unseen images the model gets right: an attack on the others would be no work."""
    x = torch.cat([part.pixels(slice(None)) for part in (digits.test, digits.validation)])
    y = torch.cat([digits.test.labels, digits.validation.labels])
    with torch.no_grad():
        rows = (model(x).argmax(1) == y).nonzero().squeeze(1)[:BATCH]
    assert len(rows) == BATCH
    return x[rows], y[rows]


def test_pgd_40_on_an_undefended_network(
    benchmark: BenchmarkFixture, undefended: nn.Module, digits: Dataset
) -> None:
    x, y = correct_ones(undefended, digits)
    result = benchmark.pedantic(race, args=(undefended, x, y, 2), rounds=1)
    benchmark.extra_info.update(result.summary())
    assert result.left["ours"] <= min(result.left.values()) + 0.003
    assert result.ratio("torchattacks") >= 1.3, result.summary()
    assert result.ratio("art") >= 1.8, result.summary()


def test_pgd_40_on_a_robust_network(
    benchmark: BenchmarkFixture, robust_digit_model: nn.Module, digits: Dataset
) -> None:
    x, y = correct_ones(robust_digit_model, digits)
    result = benchmark.pedantic(race, args=(robust_digit_model, x, y, 5), rounds=1)
    benchmark.extra_info.update(result.summary())
    assert result.left["ours"] <= min(result.left.values()) + 0.003
    assert result.ratio("torchattacks") >= 1, result.summary()
    assert result.ratio("art") >= 1, result.summary()
    assert result.ratio("foolbox") >= 1, result.summary()

"""Cheap signs that a number should not be believed, raised as flags of the record.

The checks here need no further attack. Sources: Carlini et al. 2019 (arXiv:1902.06705), Croce and
Hein 2020 (arXiv:2003.01690, the checks of their code), Pintor et al. 2022 (arXiv:2106.09947).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_local.data import Dataset
from robustbench_local.gradients import input_gradient, pristine
from robustbench_local.types import Images, Labels, Model

SAMPLE = 256
"""Test images, the first ones, that the checks of the victim look at."""

SPREAD = 1e-4
"""Distance of normalised logits between two passes above which a victim counts as random."""

_PASSES = 5
_SMALLEST_SUBSET = 1000


@dataclass(frozen=True)
class Flag:
    """One doubt: its name, whether it withholds the rank, what was measured, and a sentence."""

    name: str
    severe: bool
    measured: float
    why: str


def is_random(victim: Model, data: Dataset, *, sample: int = SAMPLE) -> bool:
    """Whether forward passes of the same images differ, declared or not."""
    rows = slice(0, sample)
    return _look_often(victim, data.test.pixels(rows), data.test.labels[rows]).random


def audit(
    victim: Model, data: Dataset, *, eot_samples: int = 1, sample: int = SAMPLE
) -> list[Flag]:
    """The flags of a victim on a dataset; `eot_samples` is what the attack averaged over.

    `sample` is the number of test images looked at, no more than fit on the device.
    """
    rows = slice(0, sample)
    x, y = data.test.pixels(rows), data.test.labels[rows]
    return [
        *_subset(data),
        *_forward_checks(victim, x, y, eot_samples),
        *_zero_gradient(victim, x, y),
    ]


def _subset(data: Dataset) -> Iterator[Flag]:
    n = len(data.test)
    if n < _SMALLEST_SUBSET or n < data.test_total or data.source == "embedded":
        part = f"{n} of {data.test_total}" if n < data.test_total else f"all {n}"
        yield Flag("subset", False, n, f"measured on {part} test images of {data.name}")


def _forward_checks(victim: Model, x: Images, y: Labels, eot_samples: int) -> Iterator[Flag]:
    looks = _look_often(victim, x, y)
    outputs, spread = looks.outputs, looks.spread
    with pristine(victim, seed=0):
        tracked = victim(x.clone().requires_grad_()).detach()

    if eot_samples == 1 and looks.random:
        yield Flag(
            "randomized",
            True,
            spread,
            f"{_PASSES} forward passes differ by up to {spread:.2g} and the attack used one sample "
            "of them; type attack=standard_rand, or attack.eot_samples=20 where the attack has it",
        )
    switch = largest_distance(torch.stack([outputs[0], tracked]))
    if spread <= SPREAD < switch:
        yield Flag(
            "gradient_switch",
            True,
            switch,
            f"the outputs change by up to {switch:.2g} when gradients are recorded",
        )
    sums = outputs[0].sum(1)
    excess = float((sums - 1).abs().max())
    if excess < 1e-5 and float(outputs[0].min()) > -1e-5:
        yield Flag(
            "softmax_output",
            False,
            excess,
            "the model returns probabilities; logits give attacks better gradients",
        )


class _Looks(NamedTuple):
    outputs: Tensor  # (passes, N, K)
    spread: float
    random: bool


def _look_often(victim: Model, x: Images, y: Labels) -> _Looks:
    """Several passes of the same images: random is whatever changes logits or a prediction."""
    with pristine(victim, seed=0), torch.no_grad():
        outputs = torch.stack([victim(x) for _ in range(_PASSES)])
    spread = largest_distance(outputs)
    counts = (outputs.argmax(2) == y).sum(1)
    return _Looks(outputs, spread, spread > SPREAD or bool(counts.min() != counts.max()))


def largest_distance(outputs: Tensor) -> float:
    """Largest L2 distance between normalised logits of the same image, over pairs of passes."""
    unit = torch.nn.functional.normalize(outputs.double(), dim=2)
    return float((unit[:, None] - unit[None]).norm(dim=3).max())


def _zero_gradient(victim: Model, x: Images, y: Labels) -> Iterator[Flag]:
    with pristine(victim, seed=0):
        gradient = input_gradient(victim, x, y, loss="margin").gradient
    zeros = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    if zeros:
        yield Flag(
            "zero_gradient",
            True,
            zeros,
            f"{zeros} of {len(x)} images have an input gradient of exactly zero, so gradient "
            "attacks cannot move them",
        )

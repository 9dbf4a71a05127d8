"""How many draws are enough, on victims where that is known."""

import torch
from torch import nn

from robustbench_local.attacks import PGD, Attack
from robustbench_local.data import Split
from robustbench_local.evaluation import Averaging, Judging, raise_samples
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel

THREAT = ThreatModel(norm="linf", epsilon=0.1)


class Sum(nn.Module):
    """Class 1 where the mean pixel is above one half."""

    def forward(self, x):
        margin = x.flatten(1).mean(1) - 0.5
        return torch.stack([-margin, margin], 1)


class Patient(Attack):
    """Breaks an image of number i from so many draws on that `needed` says."""

    needs = "gradients"
    norms = frozenset({"linf"})

    def __init__(self, samples, needed):
        super().__init__()
        object.__setattr__(self, "samples", samples)
        object.__setattr__(self, "needed", needed)

    def run(self, model, x, y, threat):
        breaks = torch.arange(len(x)) < len(x) * self.needed(self.samples)
        return torch.where(breaks.view(-1, 1, 1, 1), x - 0.1, x)


def split(n=60):
    images = torch.full((n, 1, 4, 4), 140, dtype=torch.uint8)  # 0.549: 0.1 less is class 0
    return Split(images, torch.ones(n, dtype=torch.int64), torch.arange(n))


def settle(needed, *, limit=80, sample=40, declared=10):
    oracle = Oracle(Sum(), THREAT, 2)
    return raise_samples(
        oracle, lambda samples: Patient(samples, needed), split(), declared,
        Averaging(sample=sample, limit=limit), batch_size=16, judging=Judging(),
    )  # fmt: skip


def test_what_more_draws_do_not_change_is_settled():
    found = settle(lambda samples: 0.5)
    assert (found.samples, found.stable) == (10, True)
    assert [tried["samples"] for tried in found.tried] == [10, 20]
    # Of each batch of 16 images half are broken, and 4 of the last 8.
    assert found.tried[0] == {"samples": 10, "robust_accuracy": 0.5, "n": 40}


def test_draws_are_doubled_while_they_break_more():
    found = settle(lambda samples: {10: 0.1, 20: 0.6}.get(samples, 1.0), limit=320)
    assert (found.samples, found.stable) == (40, True)
    assert [tried["samples"] for tried in found.tried] == [10, 20, 40, 80]


def test_the_limit_ends_the_doubling_unsettled():
    found = settle(lambda samples: samples / 40, limit=40)
    assert (found.samples, found.stable) == (40, False)


def test_no_sample_believes_what_is_declared():
    found = settle(lambda samples: samples / 100, sample=0)
    assert (found.samples, found.stable, found.tried) == (10, None, ())


class Noisy(Sum):
    randomized = True

    def forward(self, x):
        return super().forward(x + 0.05 * torch.randn_like(x))


def test_a_random_victim_is_judged_by_its_draws():
    oracle = Oracle(Noisy(), THREAT, 2, randomized=True)
    found = raise_samples(
        oracle, lambda samples: PGD(steps=3, step_size=1, eot_samples=samples), split(), 20,
        Averaging(sample=40, limit=80), batch_size=40, judging=Judging(draws=10),
    )  # fmt: skip
    assert found.stable and found.tried[-1]["robust_accuracy"] < 0.05

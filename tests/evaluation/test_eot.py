"""How many draws are enough, on victims where that is known."""

import pytest
import torch
from torch import nn

from robustbench_local.attacks import PGD, Attack
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.evaluation import Averaging, Judging, audit_samples, raise_samples
from robustbench_local.oracle import Oracle, QueryBudgetError
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


def settle(needed, *, limit=80, sample=40, declared=10, tolerance=0.02, batch_size=16):
    oracle = Oracle(Sum(), THREAT, 2)
    return raise_samples(
        oracle, lambda samples: Patient(samples, needed), split(100), declared,
        Averaging(sample=sample, limit=limit, tolerance=tolerance), batch_size=batch_size,
        judging=Judging(),
    )  # fmt: skip


def of_a_hundred(broken, **keywords):
    """Where so many of 100 images break from a number of draws."""
    return settle(
        lambda samples: broken[samples] / 100, sample=100, batch_size=100, **keywords
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


@pytest.mark.parametrize(
    ("broken", "samples", "tried"),
    [
        ({10: 50, 20: 52}, 20, 2),  # within the tolerance, and still the stronger one
        ({10: 50, 20: 53, 40: 53}, 20, 3),
        ({10: 50, 20: 58, 40: 57}, 20, 3),  # within an interval over 100 images, but paired
        ({10: 50, 20: 30}, 10, 2),
    ],
)
def test_the_same_images_are_compared_and_what_breaks_most_is_taken(broken, samples, tried):
    found = of_a_hundred(broken, limit=320)
    assert (found.samples, len(found.tried), found.stable) == (samples, tried, True)
    assert audit_samples(found).raised is False


def test_the_tolerance_is_a_setting():
    broken = {10: 50, 20: 58, 40: 58}
    assert len(of_a_hundred(broken, tolerance=0.08, limit=320).tried) == 2
    assert len(of_a_hundred(broken, tolerance=0, limit=320).tried) == 3


def test_the_limit_ends_the_doubling_unsettled():
    found = settle(lambda samples: samples / 40, limit=40)
    assert (found.samples, found.stable) == (40, False)
    check = audit_samples(found)
    assert check.raised and not check.severe and "raise eot.limit" in check.why
    assert "20: 50.0%, 40: 0.0%" in check.why


@pytest.mark.parametrize(("sample", "limit"), [(0, 80), (40, 19), (40, 5)])
def test_the_declared_number_is_believed_where_nothing_can_be_compared(sample, limit):
    found = settle(lambda samples: samples / 100, sample=sample, limit=limit)
    assert (found.samples, found.stable, found.tried) == (10, None, ())
    assert audit_samples(found).raised is audit_samples(None).raised is None


@pytest.mark.parametrize(("affordable", "stable"), [(10, None), (20, False)])
def test_a_query_budget_ends_the_doubling(affordable, stable):
    def needed(samples):
        if samples > affordable:
            raise QueryBudgetError("too many")
        return samples / 100

    found = settle(needed)
    assert (found.samples, found.stable) == (affordable, stable)


def test_a_query_budget_that_the_declared_number_breaks_is_an_error():
    def needed(samples):
        raise QueryBudgetError("too many")

    with pytest.raises(QueryBudgetError):
        settle(needed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample", -5), ("sample", 2.5), ("sample", True), ("limit", 0), ("limit", "many"),
        ("tolerance", -0.1), ("tolerance", 1), ("tolerance", float("nan")), ("tolerance", "low"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(key, value):
    with pytest.raises(UserError, match=rf"eot\.{key}={value}; expected .*type for example eot"):
        Averaging(**{"sample": 40, "limit": 80, "tolerance": 0.02, key: value})


class Coin(Sum):
    """Turned around in three draws of ten."""

    randomized = True

    def forward(self, x):
        logits = super().forward(x)
        return torch.where(torch.rand(len(x), 1) < 0.3, logits.flip(1), logits)


def test_a_random_victim_is_judged_by_its_draws():
    oracle = Oracle(Coin(), THREAT, 2, randomized=True)
    found = raise_samples(
        oracle, lambda samples: PGD(steps=3, step_size=1, eot_samples=samples), split(), 20,
        Averaging(sample=40, limit=80, tolerance=0.02), batch_size=40, judging=Judging(draws=10),
    )  # fmt: skip
    left = [tried["robust_accuracy"] for tried in found.tried]
    assert left == pytest.approx([0.3] * len(left), abs=0.08)
    # 40 images in 10 draws each: with one draw these would be whole images.
    assert all((400 * share) == pytest.approx(round(400 * share)) for share in left)
    assert any((40 * share) != pytest.approx(round(40 * share)) for share in left)

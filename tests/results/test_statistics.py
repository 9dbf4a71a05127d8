"""Intervals against the closed formula."""

from math import sqrt

import numpy as np
import pytest

from robustbench_local.results import wilson
from robustbench_local.results.statistics import accuracy


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 10), (1, 10), (50, 100), (962, 1000), (10000, 10000)]
)
def test_wilson_is_the_formula(successes, n):
    z = 1.959963984540054
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert wilson(successes, n) == pytest.approx((share, centre - half, centre + half), abs=1e-12)


def test_fractions_of_draws_keep_their_value():
    assert wilson(49.6, 100).value == 0.496
    assert wilson(49.6, 100)[1:] == wilson(50, 100)[1:]


def test_without_several_draws_the_interval_is_over_images():
    correct = np.array([1.0, 1, 0, 1])
    for count in (0, 1):
        draws = np.tile(correct[:, None] > 0, (1, count))
        assert accuracy(correct, draws) == wilson(3, 4)


def test_draws_that_all_images_share_widen_the_interval():
    """Of ten draws six turn all of 1,000 images at once: ten coins, not a thousand images."""
    draws = np.tile(np.arange(10) < 6, (1000, 1))
    value, low, high = accuracy(draws.mean(1), draws)
    half = 2.262157 * sqrt(10 / 9 * 0.6 * 0.4) / sqrt(10)  # Student, 9 degrees of freedom
    assert (value, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half), abs=1e-6)
    assert high - low > 10 * np.subtract(*wilson(600, 1000)[:0:-1])


def test_limits_are_fractions_and_the_wider_interval_stands():
    alone = np.random.default_rng(0).random((400, 200)) < 0.5
    assert accuracy(alone.mean(1), alone) == wilson(alone.mean(1).sum(), 400)
    draws = np.tile(np.arange(4) < 3, (50, 1))
    _, low, high = accuracy(draws.mean(1), draws)
    assert low == 0 and high == 1


def test_intervals_hold_what_they_promise_where_a_batch_shares_its_draw():
    """Each draw moves the accuracy of 1,000 images by five points; the truth is 0.6."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        shift = generator.normal(0.6, 0.05, 10)
        draws = generator.random((1000, 10)) < shift
        _, low, high = accuracy(draws.mean(1), draws)
        held += low <= 0.6 <= high
    assert held > 180

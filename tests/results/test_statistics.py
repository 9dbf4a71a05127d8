"""Intervals against the closed formula."""

from math import sqrt

import pytest

from robustbench_local.results import wilson


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

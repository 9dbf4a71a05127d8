"""Intervals for accuracies."""

from typing import NamedTuple

from scipy.stats import binomtest


class Interval(NamedTuple):
    """An accuracy with its 95% interval; all three are fractions."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: int) -> Interval:
    """The 95% Wilson interval of a proportion.

    `successes` is whole for deterministic victims. For randomised ones it is a sum of fractions
    over the judge's draws and is rounded for the limits, which makes them wider than needed.
    """
    limits = binomtest(round(successes), n).proportion_ci(0.95, method="wilson")
    return Interval(successes / n, float(limits.low), float(limits.high))

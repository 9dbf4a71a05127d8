"""Intervals for accuracies."""

from math import sqrt
from typing import Any, NamedTuple

from numpy.typing import NDArray


class Interval(NamedTuple):
    """An accuracy with its 95% interval; all three are fractions."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: int) -> Interval:
    """The 95% Wilson interval of a proportion.

    `successes` is whole for deterministic victims. For randomised ones it is a sum of fractions
    over the judge's draws and is rounded to the nearest whole number for the limits alone, which
    moves them by what half an image does.
    """
    from scipy.stats import binomtest  # not at the top: it takes a second

    limits = binomtest(round(successes), n).proportion_ci(0.95, method="wilson")
    return Interval(successes / n, float(limits.low), float(limits.high))


def accuracy(correct: NDArray[Any], draws: NDArray[Any]) -> Interval:
    """The mean of `correct`, the share of right draws of each image, with a 95% interval.

    Of a deterministic victim that of Wilson over images. Of a random one, whose single `draws` are
    given, bool (n, draws), the wider of that and of Student's t over the accuracies of the draws:
    where all images of a batch share one draw they are right or wrong together, which an interval
    over images cannot see. `draws` of shape (n, 0) or (n, 1) say nothing.
    """
    over_images = wilson(float(correct.sum()), len(correct))
    each, count = draws.mean(axis=0), draws.shape[1]
    if count < 2:
        return over_images
    from scipy.stats import t

    half = float(t.ppf(0.975, count - 1) * each.std(ddof=1)) / sqrt(count)
    value = over_images.value
    over_draws = Interval(value, max(0.0, value - half), min(1.0, value + half))
    return max(over_images, over_draws, key=lambda interval: interval.high - interval.low)

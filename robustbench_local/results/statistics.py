"""Intervals for accuracies and for differences of two, p-values, and how to adjust several.

Outcomes are fractions in [0, 1], an array (seeds, images): whether a victim keeps an image, or the
share of the judge's draws in which a random one does. All intervals are of 95%.
"""

from math import exp, log, sqrt
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

_CELLS = 2_000_000
"""Numbers that one step of a bootstrap holds at once: 16 MB."""


_NORMAL = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""


class Interval(NamedTuple):
    """An accuracy with its 95% interval; all three are fractions."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: int) -> Interval:
    """The 95% Wilson interval of a proportion; see `over_images`."""
    return over_images(successes / n, n)


def over_images(share: float, n: int) -> Interval:
    """The 95% Wilson interval of a `share` of n images.

    Of a random victim that is a mean of fractions over the judge's draws, which
    `scipy.stats.binomtest` does not take; of whole images the limits are those of scipy to the last
    digit.
    """
    square = _NORMAL**2
    whole = 2 * (n + square)
    centre = (2 * n * share + square) / whole
    half = _NORMAL / whole * sqrt(4 * n * share * (1 - share) + square)
    return Interval(
        share,
        0.0 if share == 0 else centre - half,
        1.0 if share == 1 else centre + half,
    )


def clopper_pearson(successes: int, n: int) -> Interval:
    """The 95% Clopper-Pearson interval, which covers that or more: wider than that of Wilson."""
    from scipy.stats import binomtest

    limits = binomtest(successes, n).proportion_ci(0.95, method="exact")
    return Interval(successes / n, float(limits.low), float(limits.high))


def accuracy(correct: NDArray[Any], draws: NDArray[Any]) -> Interval:
    """The mean of `correct`, the share of right draws of each image, with a 95% interval.

    Of a deterministic victim that of Wilson over images. Of a random one, whose single `draws` are
    given, bool (n, draws), that of Student's t over the accuracies of the draws is added: where all
    images of a batch share one draw they are right or wrong together, which an interval over images
    cannot see. Where each image draws for itself Wilson's holds that part already: the limits are
    then wider than they must, by up to 6% on average for 10 draws, by much more for two. `draws`
    of shape (n, 0) or (n, 1) say nothing.
    """
    n = len(correct)
    return accuracy_over_draws(float(correct.sum()) / n, n, draws.mean(axis=0))


def accuracy_over_draws(value: float, n: int, means: Floats) -> Interval:
    """The interval of `accuracy` around `value` of n images, whose single draws had `means`."""
    alone = over_images(value, n)
    return _added(alone, means) if len(means) > 1 else alone


def _added(alone: Interval, means: Floats) -> Interval:
    """The interval with that of Student's t over independent `means` added, of draws or seeds.

    The two are independent sources: half widths are added as squares on either side (MOVER, Zou and
    Donner 2008).
    """
    from scipy.special import stdtrit

    half = float(stdtrit(len(means) - 1, 0.975)) * sqrt(_squared_error(means))
    value, low, high = alone
    low = value - sqrt(max(0.0, value - low) ** 2 + half**2)
    high = value + sqrt(max(0.0, high - value) ** 2 + half**2)
    return Interval(value, max(0.0, low), min(1.0, high))


class Source(NamedTuple):
    """Something that a difference of means varies over, and by how much."""

    over: Literal["images", "seeds", "draws"]
    variance: float
    degrees_of_freedom: int


Draws: TypeAlias = NDArray[np.bool_] | None
"""Whether a random victim is right in each draw, (images, draws); None of one that is not random.

Those of two victims are aligned: the judge gives runs of one seed the same draws."""


class SeedSummary(NamedTuple):
    """One number over training seeds; `sd` is None for one seed, which tells nothing of it."""

    mean: float
    sd: float | None
    worst: float
    low: float
    high: float
    seeds: int
    images: int


def seed_summary(values: ArrayLike) -> SeedSummary:
    """The mean over seeds of outcomes (seeds, images), how far seeds lie apart, and the worst.

    The interval is for the mean over all seeds that could be drawn and all images: that of Wilson
    over images and that of Student's t over the means of the seeds, added. Seeds share their
    images, so that more of them never make the first smaller. Of one seed it is Wilson's, and says
    nothing about training noise.
    """
    outcomes = _matrix(values)
    seeds, images = outcomes.shape
    each = outcomes.mean(axis=1)
    alone = wilson(float(outcomes.sum()) / seeds, images)
    several = seeds > 1
    mean, low, high = _added(alone, each) if several else alone
    sd = float(each.std(ddof=1)) if several else None
    return SeedSummary(mean, sd, float(each.min()), low, high, seeds, images)


class Paired(NamedTuple):
    """Two victims on the same images: the first minus the second, in fractions.

    `only_first` counts the images that the first keeps and the second does not; of several seeds or
    draws what most of them say.
    """

    difference: float
    low: float
    high: float
    p_value: float
    only_first: int
    only_second: int
    images: int
    seeds: tuple[int, int]
    method: str
    over: tuple[str, ...]  # the sources of variance


def paired(
    first: ArrayLike,
    second: ArrayLike,
    *,
    draws: tuple[Draws, Draws] = (None, None),
    resamples: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Compare two victims on the same images in the same order; seeds are different trainings.

    The interval is a percentile bootstrap over images, with three corrections without which it
    covers too little:

    - Two images are imagined beside those measured, one that only the first keeps and one that only
      the second does (Bonett and Price 2012 do so in a closed form). Where few images tell the two
      apart, or none, those measured alone would make an interval without width.
    - Of several seeds the mean of each resample is moved by Student's t times the standard error
      over the seeds of either side. Resampling them instead, of which there are three or five,
      covers 80 or 90% only: their resamples know no tails and lack a part of their variance.
    - So it is by the `draws` of random victims, see `p_difference`; the part of the spread over
      images that is theirs is taken off.

    One seed on a side says nothing about what another training would have done. The p-value is that
    of `p_difference`.
    """
    one, two = _pair(first, second)
    images = one.shape[1]
    kept, kept_by_other = one.mean(axis=0), two.mean(axis=0)
    differences = kept - kept_by_other
    difference = float(differences.mean())
    generator = np.random.default_rng(seed)
    drawn = _resampled_means(differences, resamples, generator)
    images_alone, *others = _sources(one, two, draws)
    whole = _squared_error(differences)
    if whole > images_alone.variance:
        centre = drawn.mean()
        drawn = centre + sqrt(images_alone.variance / whole) * (drawn - centre)
    for _, variance, degrees in others:
        drawn += sqrt(variance) * generator.standard_t(degrees, resamples)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Paired(
        difference=difference,
        low=max(-1.0, min(float(low), difference)),
        high=min(1.0, max(float(high), difference)),
        p_value=p_difference(one, two, draws=draws),
        only_first=int(((kept > 0.5) & (kept_by_other <= 0.5)).sum()),
        only_second=int(((kept_by_other > 0.5) & (kept <= 0.5)).sum()),
        images=images,
        seeds=(len(one), len(two)),
        method="exact McNemar" if _is_binary(one, two) and not others else "paired t",
        over=tuple(dict.fromkeys(source.over for source in (images_alone, *others))),
    )


def _resampled_means(values: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Means of as many values, drawn with replacement from `values`, a 1 and a -1."""
    n, pool = len(values), np.round([*values, 1.0, -1.0], 12)
    distinct, counts = np.unique(pool, return_counts=True)
    # How often each distinct value is drawn says it all; of many, single draws take less time.
    few = 16 * len(distinct) < n
    step = max(1, _CELLS // (len(distinct) if few else n))
    means = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        if few:
            means.append(generator.multinomial(n, counts / len(pool), rows) @ distinct / n)
        else:
            means.append(pool[generator.integers(0, len(pool), (rows, n))].mean(axis=1))
    return np.concatenate(means)


def p_difference(
    first: ArrayLike, second: ArrayLike, *, draws: tuple[Draws, Draws] = (None, None)
) -> float:
    """Two-sided p-value for no difference, of outcomes (seeds, images) on the same images.

    `draws` are the single draws behind the outcomes of random victims. Where all images of a batch
    share one draw they are right or wrong together, which no variance over images shows. Of a side
    of several seeds the spread of their means holds that already, and its draws are not looked at.

    - Of one seed and whole outcomes each: McNemar's exact test, which asks whether the images that
      only one of the two keeps fall to either side like a fair coin.
    - Else a t-test of the difference of the means with several sources of variance: that of the
      differences over images, by the number of images, of either side with several seeds that of
      their means, by their number, and that of the means of the draws (of two random sides with
      as many draws, of their differences draw by draw), by their number; what independent images
      would vary by over draws counts with the draws. The p-value is the level whose interval, the
      half widths of Student's t for each source added as squares, just reaches 0. A variance
      over two or three seeds is itself so uncertain that a normal distribution would call far too
      much significant, and so, measured, do the degrees of freedom of Welch and Satterthwaite; this
      never does (Banerjee 1961). With one source it is the ordinary t-test.
    - Where nothing varies, so that no t exists: the sign test over images.

    A side of one seed adds nothing for training noise, which one seed cannot tell: the test is then
    about these weights and not about the training that made them.
    """
    one, two = _pair(first, second)
    sources = _sources(one, two, draws)
    if _is_binary(one, two) and len(sources) == 1:
        kept, kept_by_other = one[0] > 0, two[0] > 0
        return _mcnemar(int((kept & ~kept_by_other).sum()), int((kept_by_other & ~kept).sum()))
    differences = one.mean(axis=0) - two.mean(axis=0)
    sources = [source for source in sources if source.variance > _ROUNDING]
    if not sources:
        signs = np.sign(np.round(differences, 12))
        return _mcnemar(int((signs > 0).sum()), int((signs < 0).sum()))
    from scipy.special import stdtr, stdtrit

    size = abs(float(differences.mean()))
    alone = max(float(2 * stdtr(own, -size / sqrt(variance))) for _, variance, own in sources)
    if len(sources) == 1 or alone < 1e-200:
        return alone
    from scipy.optimize import brentq

    def excess(log_p: float) -> float:
        reach = sum(variance * stdtrit(own, exp(log_p) / 2) ** 2 for _, variance, own in sources)
        return float(reach - size**2)

    if excess(log(alone)) <= 0:  # the others add no more than rounding does
        return alone
    return exp(float(brentq(excess, log(alone), 0, xtol=1e-9)))


def _sources(one: Floats, two: Floats, draws: tuple[Draws, Draws]) -> list[Source]:
    """What the difference of the means varies over: images first, then what they do not show."""
    sides = (one, two)
    found = [
        Source("seeds", _squared_error(side.mean(axis=1)), len(side) - 1)
        for side in sides
        if len(side) > 1
    ]
    single = [
        each
        for side, each in zip(sides, draws, strict=True)
        if len(side) == 1 and each is not None and each.shape[1] > 1
    ]
    means = [each.mean(axis=0) for each in single]
    if len(means) == 2 and len(means[0]) == len(means[1]):
        means = [means[0] - means[1]]  # whatever draws of one seed do to both
    found += [Source("draws", _squared_error(each), len(each) - 1) for each in means]
    of_images = _squared_error(one.mean(axis=0) - two.mean(axis=0)) - sum(map(_alone, single))
    real = [source for source in found if source.variance > _ROUNDING]
    return [Source("images", max(0.0, of_images), one.shape[1] - 1), *real]


_ROUNDING = 1e-24
"""Variances up to this are those of rounding: nothing varies."""


def _alone(draws: NDArray[np.bool_]) -> float:
    """What the mean over images varies by, over draws that each image would have for itself."""
    images, count = draws.shape
    share = draws.mean(axis=1)
    return float((share * (1 - share)).sum() / ((count - 1) * images**2))


def _squared_error(values: Floats) -> float:
    """Of the mean of independent values; 0 of a single one, which says nothing about it."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _mcnemar(only_first: int, only_second: int) -> float:
    from statsmodels.stats.contingency_tables import mcnemar

    return float(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def holm(p_values: ArrayLike) -> Floats:
    """The p-values of several tests made at once, adjusted after Holm, in the same order."""
    from statsmodels.stats.multitest import multipletests

    given = np.asarray(p_values, np.float64)
    if not given.size:
        return given
    adjusted: Floats = multipletests(given, method="holm")[1]
    return adjusted


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    one, two = _matrix(first), _matrix(second)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"{one.shape[1]} and {two.shape[1]} images; expected the same images")
    return one, two


def _matrix(values: ArrayLike) -> Floats:
    """Outcomes (seeds, images); those of one seed may come as (images,)."""
    outcomes = np.atleast_2d(np.asarray(values, np.float64))
    if outcomes.ndim != 2 or not outcomes.size:
        raise ValueError(f"outcomes of shape {outcomes.shape}; expected (seeds, images)")
    return outcomes


def _is_binary(*sides: Floats) -> bool:
    return all(len(side) == 1 and bool(((side == 0) | (side == 1)).all()) for side in sides)

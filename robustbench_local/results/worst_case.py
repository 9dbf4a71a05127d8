"""The worst case over several attacks, image by image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustbench_local.results.statistics import Draws, Interval, accuracy_over_draws
from robustbench_local.results.summary import Summary, seen

if TYPE_CHECKING:
    from robustbench_local.results.store import Store


class WorstCase(NamedTuple):
    """How each image of a victim of one seed fares; of a random one also in each draw."""

    images: NDArray[Any]
    draws: Draws = None


def worst_case(store: "Store", runs: Sequence[Summary]) -> WorstCase:
    """How each image fares under what is worst for it, (n,); bool where nothing is random.

    Never above the strongest attack in the mean. Of a random victim the least of several noisy
    shares is luck, which would grow with every attack added: the attack of each image is chosen on
    one half of the judge's draws and scored on the other, and the other way round. Where no two
    draws of each attack are recorded, the strongest attack stands.
    """
    outcomes = [seen(store, run) for run in runs]
    if len({outcome.images for outcome in outcomes}) > 1:
        raise RuntimeError("records with one comparability key hold different test images")
    robust = np.array([outcome.robust for outcome in outcomes])
    if not any(run.randomized for run in runs):
        worst: NDArray[Any] = robust.min(axis=0)
        binary = ((worst == 0) | (worst == 1)).all()
        return WorstCase(worst.astype(np.bool_) if binary else worst)
    decides = outcomes[int(robust.mean(axis=1).argmin())]
    strongest = WorstCase(decides.robust, decides.draws)
    counts = {outcome.draws.shape[1] for outcome in outcomes}
    if min(counts) < 2:
        return strongest
    even, odd = (
        np.array([outcome.draws[:, first::2].mean(axis=1) for outcome in outcomes])
        for first in (0, 1)
    )
    images = np.arange(robust.shape[1])
    by_even, by_odd = even.argmin(axis=0), odd.argmin(axis=0)
    crossed = (odd[by_even, images] + even[by_odd, images]) / 2
    if crossed.mean() >= strongest.images.mean():
        return strongest
    common = np.arange(min(counts))  # the draws that all attacks have
    draws = np.array([outcome.draws[:, common] for outcome in outcomes])
    chosen = np.where(common % 2, by_even[:, None], by_odd[:, None])
    return WorstCase(crossed, draws[chosen, images[:, None], common])


def worst_interval(value: float, outcomes: Sequence[WorstCase]) -> Interval:
    """The 95% interval of `statistics.accuracy` around a worst case, or the mean of several seeds.

    Its limits are those of one seed, the widest of any: seeds of a random victim differ in how far
    their draws lie apart.
    """
    nothing: NDArray[np.float64] = np.empty(0)
    intervals = []
    for images, draws in outcomes:
        means = nothing if draws is None or draws.shape[1] < 2 else draws.mean(axis=0)
        intervals.append(accuracy_over_draws(value, len(images), means))
    return max(intervals, key=lambda interval: interval.high - interval.low)

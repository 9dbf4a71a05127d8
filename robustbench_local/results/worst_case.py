"""The worst case over several attacks, image by image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustbench_local.results.statistics import NOTHING, Source, shared_by_images
from robustbench_local.results.summary import Summary, seen

if TYPE_CHECKING:
    from robustbench_local.results.store import Store


class WorstCase(NamedTuple):
    """How each image of a victim of one seed fares, and what its images have in common."""

    images: NDArray[Any]
    shared: Source = NOTHING


def shared_alone(seeds: Sequence[WorstCase]) -> list[Source]:
    """What the images have in common, of one seed; several show it by how far they lie apart."""
    return [seeds[0].shared] if len(seeds) == 1 else []


def worst_case(store: "Store", runs: Sequence[Summary]) -> WorstCase:
    """How each image fares under what is worst for it, (n,); bool where nothing is random.

    Never above the strongest attack in the mean. Of a random victim the least of several noisy
    shares is luck, which would grow with every attack added: the attack of each image is chosen on
    one half of the judge's draws and scored on the other, and the other way round. Where no two
    draws of each attack are recorded, the strongest attack stands. Its draws say what the images
    have in common.
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
    strongest, shared = decides.robust, shared_by_images(decides.draws)
    if any(outcome.draws.shape[1] < 2 for outcome in outcomes):
        return WorstCase(strongest, shared)
    even, odd = (
        np.array([outcome.draws[:, first::2].mean(axis=1) for outcome in outcomes])
        for first in (0, 1)
    )
    images = np.arange(robust.shape[1])
    crossed = (odd[even.argmin(axis=0), images] + even[odd.argmin(axis=0), images]) / 2
    return WorstCase(min(strongest, crossed, key=np.mean), shared)

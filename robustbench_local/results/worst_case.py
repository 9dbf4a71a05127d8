"""The worst case over several attacks, image by image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robustbench_local.results.summary import Summary, seen

if TYPE_CHECKING:
    from robustbench_local.results.store import Store


def per_image(store: "Store", runs: Sequence[Summary]) -> NDArray[Any]:
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
        return worst.astype(np.bool_) if binary else worst
    strongest: NDArray[Any] = robust[robust.mean(axis=1).argmin()]
    if any(outcome.draws.shape[1] < 2 for outcome in outcomes):
        return strongest
    even, odd = (
        np.array([outcome.draws[:, first::2].mean(axis=1) for outcome in outcomes])
        for first in (0, 1)
    )
    images = np.arange(robust.shape[1])
    crossed = (odd[even.argmin(axis=0), images] + even[odd.argmin(axis=0), images]) / 2
    return min(strongest, crossed, key=np.mean)

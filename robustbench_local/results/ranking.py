"""Ranks with ties: rows that the images do not tell apart share one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustbench_local.results.statistics import p_difference

LEVEL = 0.05
"""For all tests of one table together."""


def ranks(outcomes: Sequence[Sequence[NDArray[Any]]]) -> list[int]:
    """The rank of each row, of rows in falling order of their worst case: 1, 1, 3 and so on.

    `outcomes` are the worst cases of each row: per seed those of the images, (n,), in one order.
    The first row of a rank leads it. Going down, a row shares the rank of the leader before it
    unless the paired difference to that leader is significant; then it leads the next rank. So each
    row but the first is tested once, against one leader, and no chain of small steps can tie rows
    that differ; with m rows each test has the level 5% / (m - 1) (Bonferroni), fixed in advance.
    """
    level = LEVEL / max(1, len(outcomes) - 1)
    leader, found = 0, []
    for place in range(len(outcomes)):
        if place and p_difference(_stacked(outcomes[leader]), _stacked(outcomes[place])) < level:
            leader = place
        found.append(leader + 1)
    return found


def _stacked(seeds: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    return np.stack(seeds).astype(np.float64)

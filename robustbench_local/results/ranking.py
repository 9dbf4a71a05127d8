"""Ranks with ties: rows that the images do not tell apart share one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from robustbench_local.results.statistics import p_difference
from robustbench_local.results.worst_case import WorstCase

LEVEL = 0.05
"""For all tests of one table together."""


def ranks(rows: Sequence[Sequence[WorstCase]]) -> list[int]:
    """The rank of each row, of rows in falling order of their worst case: 1, 1, 3 and so on.

    `rows` are the worst cases of each, per seed, all of the same images in one order. The first row
    of a rank leads it. Going down, a row shares the rank of the leader before it unless the paired
    difference to that leader is significant; then it leads the next rank. So each row but the first
    is tested once, against one leader, and no chain of small steps can tie rows that differ; with m
    rows each test has the level 5% / (m - 1) (Bonferroni), fixed in advance.
    """
    level = LEVEL / max(1, len(rows) - 1)
    leader, found = 0, []
    for place, row in enumerate(rows):
        if place and _p_value(rows[leader], row) < level:
            leader = place
        found.append(leader + 1)
    return found


def _p_value(first: Sequence[WorstCase], second: Sequence[WorstCase]) -> float:
    draws = (first[0].draws, second[0].draws)  # of several seeds they are not looked at
    return p_difference(_stacked(first), _stacked(second), draws=draws)


def _stacked(seeds: Sequence[WorstCase]) -> NDArray[np.float64]:
    return np.stack([seed.images for seed in seeds]).astype(np.float64)

"""Records of older versions, brought up to the version of today step by step, in memory alone."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from robustbench_local.results.statistics import accuracy_over_draws

RECORD_VERSION = 6
"""What is written. Versions from `OLDEST` are read."""

OLDEST = 3


def migrate(record: dict[str, Any]) -> dict[str, Any]:
    """The record with all that was added since its version; what was measured is not changed.

    An addition is what it would have been where that is known, and else null or empty, which every
    reader takes for "was not asked then". The limits of random victims, which follow from what was
    measured, are made anew. The file itself stays as it is.
    """
    while record["version"] < RECORD_VERSION:
        record = _STEPS[record["version"]](record)
    return record


def _to_4(record: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics, and what was learned, proved, averaged and audited."""
    added = {
        "metrics": None,
        "learned": {},
        "certified": None,
        "eot": None,
        "audit": {"level": "cheap", "checks": []},
    }
    return {**added, **record, "version": 4}


def _to_5(record: Mapping[str, Any]) -> dict[str, Any]:
    """What came while the version was 4, and the checksum, which nobody can make up afterwards."""
    added = {
        # Before it was told, several draws were made of random victims only.
        "randomized": record["judge_draws"] > 1,
        "accuracy_of_draws": None,
        "detection": None,
    }
    return {**added, **record, "version": 5}


def _to_6(record: Mapping[str, Any]) -> dict[str, Any]:
    """Limits of random victims from images and the draws told, where the wider of the two stood."""
    limits = {}
    for when, means in (record.get("accuracy_of_draws") or {}).items():
        name, n = f"{when}_accuracy", record["n"]
        value = record[name]["value"]
        limits[name] = accuracy_over_draws(value, n, np.asarray(means, np.float64))._asdict()
    return {**record, **limits, "version": 6}


_STEPS: Mapping[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    3: _to_4,
    4: _to_5,
    5: _to_6,
}

"""Which flags of which runs stand, and whether they withhold a rank."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from robustbench_local.evaluation.audit import OF_THE_ATTACK
from robustbench_local.results.summary import Summary

RANKING_ATTACKS = frozenset({"standard", "autoattack"})
"""A row is ranked only with one of these among its attacks; PGD alone is provisional."""

_SAMPLE_SIZES = frozenset(
    {"images", "passes", "sample", "black_box_queries", "noise_draws", "frozen_images"}
)
"""Settings of an audit of which more is closer."""


class Doubt(NamedTuple):
    """A flag, and the run that raised it."""

    flag: Mapping[str, Any]
    run: Summary


def standing(runs: Sequence[Summary]) -> list[Doubt]:
    """The flags of one attack on one victim, run several times; in order of time.

    A flag stands until a later run makes the check as closely and finds nothing; a check that was
    left out takes nothing back. A severe finding is not replaced by a mild one.
    """
    stand: dict[str, Doubt] = {}
    for run in runs:
        for name in run.cleared:
            if name in stand and _looks_as_closely(run, stand[name].run):
                del stand[name]
        for flag in run.flags:
            if flag["severe"] or flag["name"] not in stand:
                stand[flag["name"]] = Doubt(flag, run)
    return list(stand.values())


def _looks_as_closely(later: Summary, earlier: Summary) -> bool:
    """Whether the audit of a run had the settings of an earlier one, or larger samples."""
    now = later.audit
    return all(
        now.get(key) == value or (key in _SAMPLE_SIZES and now.get(key, 0) > value)
        for key, value in earlier.audit.items()
        if key != "level"
    )


def is_withheld(met: Mapping[str, Sequence[Summary]]) -> bool:
    """Whether a severe doubt about a seed, by its attacks, is unanswered.

    A doubt about one attack is answered by a ranking one that no severe flag doubts, and that was
    found free of this very doubt.
    """
    severe = {
        attack: {doubt.flag["name"] for doubt in standing(runs) if doubt.flag["severe"]}
        for attack, runs in met.items()
    }
    trusted = [attack for attack in met if attack in RANKING_ATTACKS and not severe[attack]]
    cleared = {name for attack in trusted for run in met[attack] for name in run.cleared}
    return not set().union(*severe.values()) <= cleared & OF_THE_ATTACK


def starred(flags: Iterable[Mapping[str, Any]]) -> str:
    """The names of flags, each once, with a star where one of that name is severe."""
    severe: dict[str, bool] = {}
    for flag in flags:
        severe[flag["name"]] = severe.get(flag["name"], False) or flag["severe"]
    return " ".join(f"{name}*" if severe[name] else name for name in sorted(severe))

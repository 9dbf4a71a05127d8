"""Records of another results folder, folded into this one."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robustbench_local.errors import UserError
from robustbench_local.results.integrity import (
    Damaged,
    Record,
    UnknownVersion,
    check_examples,
    read,
)
from robustbench_local.results.summary import victim_of

if TYPE_CHECKING:
    from robustbench_local.results.store import Store

_NUMBERS = (
    "comparability", "seed", "n", "clean_accuracy", "robust_accuracy", "accuracy_of_draws",
    "attack_success_rate", "target_success_rate", "perturbation", "judge_draws", "eot",
    "certified", "detection", "metrics", "passes_per_attacked_image",
)  # fmt: skip
"""What two records of one run must agree in. Times and machines may differ."""

_NAMED = 3
"""Differences that a conflict names, of those there are."""


@dataclass
class MergeReport:
    """What became of each record of the other folder, in order of run ids."""

    added: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    conflicts: list[tuple[str, str]] = field(default_factory=list)
    """Run id, and what differs: the record that was here stays."""
    damaged: list[str] = field(default_factory=list)
    """A sentence for each record that cannot be read; it is neither copied nor touched."""


def merge(store: "Store", other: Path) -> MergeReport:
    """Copy the records that are missing here; nothing in `other` is changed.

    Each is copied whole or not at all, so that a merge that was interrupted is simply made again.
    Raises `UserError` where there is no results folder.
    """
    folder = other / "records"
    if not folder.is_dir():
        raise UserError(
            f"{other} holds no records; expected a results folder, with records/ in it: type the "
            "folder that paths.results named"
        )
    report = MergeReport()
    for path in sorted(folder.glob("*.json")):
        try:
            theirs, data = read(path), path.read_bytes()
            check_examples(path, theirs)
            examples = path.with_suffix(".npz").read_bytes()
        except (Damaged, UnknownVersion, OSError) as error:
            report.damaged.append(f"{path.name}: {error}")
            continue
        ours = store.find(path.stem)
        if ours is None:
            try:
                store.put(path.name, data, examples)
            except UserError as error:  # a newer version of this package recorded the run here
                report.conflicts.append((path.stem, str(error)))
            else:
                report.added.append(path.stem)
            continue
        differences = _differences(ours, theirs, store.records / path.name, path)
        if differences:
            more = len(differences) - _NAMED
            told = "; ".join(differences[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
            report.conflicts.append((path.stem, told))
        else:
            report.duplicates.append(path.stem)
    return report


def _differences(ours: Record, theirs: Record, here: Path, there: Path) -> list[str]:
    """In what two records of one run differ, other than times and machines."""
    if ours["examples_sha256"] == theirs["examples_sha256"]:
        outcomes = []
    else:
        outcomes = list(_different_arrays(here.with_suffix(".npz"), there.with_suffix(".npz")))
    found = [*_different(victim_of(ours), victim_of(theirs), "hash of the weights")]
    for key in _NUMBERS:  # what an older version did not ask is no difference
        if ours.get(key) is not None and theirs.get(key) is not None:
            found += _different(ours[key], theirs[key], key)
    found += _different(_raised(ours), _raised(theirs), "flag")
    return [*found, *outcomes]


def _raised(record: Record) -> dict[str, str]:
    """The flags, which decide ranks, and how severe they are; sentences may be worded anew."""
    return {f["name"]: "severe" if f["severe"] else "mild" for f in record["flags"]}


def _different(here: Any, there: Any, name: str) -> Iterator[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        for key in sorted(here.keys() | there.keys()):
            yield from _different(here.get(key), there.get(key), f"{name}.{key}")
    elif isinstance(here, list) and isinstance(there, list):
        if here != there:
            yield f"{name} differs"
    elif here != there:
        yield f"{name} is {here} here and {there} there"


def _different_arrays(here: Path, there: Path) -> Iterator[str]:
    """The outcomes of images that differ; equal ones may have been compressed differently."""
    with np.load(here, allow_pickle=False) as ours, np.load(there, allow_pickle=False) as theirs:
        for name in sorted(set(ours) & set(theirs)):
            if not np.array_equal(ours[name], theirs[name]):
                yield f"{name} of single images differ"

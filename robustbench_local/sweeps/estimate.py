"""How long the runs of a sweep will take, from what earlier ones took."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from robustbench_local.results import Record, Store
from robustbench_local.sweeps.plan import Job

_LATEST = 500
"""So many records are looked at, the latest: an estimate is not worth reading a large store."""

_ALIKE = (
    ("dataset", "model", "defense", "attack", "awareness"),
    ("dataset", "model", "defense", "attack"),
    ("dataset", "model", "attack"),
    ("dataset", "attack"),
    ("attack",),
)
"""What a record has to have in common with a run, the closest first."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of each job; of those that nothing recorded is similar to, the mean of the others.

    `rests_on` says in words what they come from.
    """

    seconds: dict[Job, float]
    rests_on: str
    known: bool
    close: bool  # whether each job has earlier runs of its attack on its defense

    @property
    def total(self) -> float:
        """Seconds of all jobs, one after the other."""
        return sum(self.seconds.values())


def estimate(jobs: Sequence[Job]) -> Estimate:
    """Look at earlier records of the store; times grow with the number of images."""
    records = [record for store in {job.store for job in jobs} for record in _latest(store)]
    closest: dict[Job, float] = {}
    levels = []
    for job in jobs:
        found = _similar(job, records)
        if found is None:
            continue
        level, alike = found
        levels.append(level)
        each = fmean(_seconds(record) / max(1, record["n"]) for record in alike)
        closest[job] = each * job.images * max(1, len(job.run_ids))
    mean = fmean(closest.values()) if closest else 1.0
    seconds = {job: closest.get(job, mean) for job in jobs}
    trained: set[str] = set()
    for job in jobs:
        if job.untrained and job.trainings and job.trainings[0] not in trained:
            trained.add(job.trainings[0])
            seconds[job] += _training(job, records)
    close = len(levels) == len(jobs) and all(level <= 1 for level in levels)
    return Estimate(seconds, _in_words(levels, len(jobs)), bool(closest), close)


def _latest(store: Store) -> Iterator[Record]:
    paths = sorted(
        store.records.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in paths[:_LATEST]:
        if record := store.find(path.stem):
            yield record


def _similar(job: Job, records: Sequence[Record]) -> tuple[int, list[Record]] | None:
    if not job.labels:
        return None
    for level, keys in enumerate(_ALIKE):
        alike = [r for r in records if all(_label(r, key) == job.labels[key] for key in keys)]
        if alike:
            return level, alike
    return None


def _label(record: Record, key: str) -> str:
    """A name without the settings that were changed, such as pgd of pgd-steps20."""
    label = str(record["labels"][key])
    return label if key == "dataset" else re.sub(r"-[^+]*", "", label)


def _seconds(record: Record) -> float:
    told = record["seconds"]
    return float(told["attack"] + told["judge"] + told.get("preparation", 0.0))


def _training(job: Job, records: Sequence[Record]) -> float:
    """Seconds of earlier trainings of the same network under the same defense."""
    for keys in (("dataset", "model", "defense"), ("dataset", "model"), ("model",)):
        alike = [r for r in records if all(_label(r, key) == job.labels.get(key) for key in keys)]
        if alike:
            return fmean(float(record["seconds"]["training"]) for record in alike)
    return 0.0


def _in_words(levels: Sequence[int], jobs: int) -> str:
    if not levels:
        return "nothing recorded is similar"
    close = sum(level == 0 for level in levels)
    told = [f"{close} of {jobs} have earlier runs of the same attack on the same defense"]
    if len(levels) - close:
        told.append(f"{len(levels) - close} only similar ones")
    if jobs - len(levels):
        told.append(f"{jobs - len(levels)} none")
    return ", ".join(told)

"""Partial records of runs that were split, and the one record that they fold into."""

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock
from rich.console import Console
from rich.markup import escape

from robustbench_local.attacks import Attack
from robustbench_local.building import Point
from robustbench_local.evaluation.evaluate import Cost, Layout, Outcomes, fold, radii_in_a_batch
from robustbench_local.evaluation.shards import Shard
from robustbench_local.files import set_aside
from robustbench_local.results.record import measured
from robustbench_local.results.report import radius_in_words
from robustbench_local.results.store import Record, Store

OF_A_STORE = ("checksum", "examples_sha256", "examples_bytes", "leaderboard")
"""Keys that a store adds to what it is given: those of a part are not those of the whole."""

FoldReports: TypeAlias = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]
"""`Attack.fold` of the attack that was run."""


@dataclass(frozen=True)
class Shards:
    """The partial records below `shards/<run_id>/<number>-of-<n>/`, each a store of its own.

    Nobody counts them as records. Whoever adds the last one of a run folds them, under a lock: the
    record is what a run in one piece writes, apart from times and from the machines it names. Then
    they are removed. Shards that do not go together, because they attacked other weights or dealt
    out the test set otherwise, are never folded: the newest stays and the others are set aside.
    """

    store: Store
    shard: Shard
    fold_reports: FoldReports
    again: bool = False  # `force`: what is recorded already does not count

    def have(self, run_ids: Iterable[str]) -> bool:
        """Whether this shard of all the runs is recorded already.

        Radii that are attacked together depend on each other: one that is missing has all of them
        attacked again.
        """
        with self._lock():
            return not self.again and all(self._part(name, self.shard.number) for name in run_ids)

    def add(self, record: Record, outcomes: Outcomes) -> Record | None:
        """Keep what this shard found; gives the whole record where it was the last one missing."""
        run_id = record["run_id"]
        split = {
            "number": self.shard.number,
            "of": self.shard.of,
            "layout": outcomes.layout._asdict(),
            "costs": [astuple(cost) for cost in outcomes.costs],
        }
        with self._lock():
            whole = None if self.again else self.store.find(run_id)
            if whole is not None:  # by another process that had the same shard
                return whole
            self._store(run_id, self.shard.number).add(
                {**record, "shard": split}, outcomes.examples
            )
            return self._fold(run_id)

    def find(self, run_id: str) -> Record | None:
        """The whole record; folded now where the last shard was killed before it could."""
        whole = self.store.find(run_id)
        if whole is not None or not self._folder(run_id).exists():
            return whole
        with self._lock():
            return self.store.find(run_id) or self._fold(run_id)

    def missing(self, run_id: str) -> list[Shard]:
        """The shards of a run that are not recorded yet."""
        numbers = range(1, self.shard.of + 1)
        with self._lock():
            return [Shard(k, self.shard.of) for k in numbers if self._part(run_id, k) is None]

    def partial(self, run_id: str) -> Record | None:
        """What this shard found."""
        with self._lock():
            return self._part(run_id, self.shard.number)

    def _fold(self, run_id: str) -> Record | None:
        parts = {k: self._part(run_id, k) for k in range(1, self.shard.of + 1)}
        own = parts[self.shard.number]
        for number, part in parts.items():
            if own is not None and part is not None and _kind(part) != _kind(own):
                self._set_aside(run_id, number, own)
                parts[number] = None
        records = [part for part in parts.values() if part is not None]
        if len(records) < self.shard.of:
            return None
        stores = [self._store(run_id, number) for number in parts]
        record, outcomes = folded(records, stores, self.fold_reports)
        self.store.add(record, outcomes.examples)
        shutil.rmtree(self._folder(run_id))
        return self.store.find(run_id)

    def _set_aside(self, run_id: str, number: int, own: Record) -> None:
        """A shard that does not go with the one this process stands for."""
        store = self._store(run_id, number)
        part = self._part(run_id, number)
        assert part is not None
        differs = ", ".join(key for key, value in _kind(own).items() if _kind(part)[key] != value)
        set_aside(store.records / f"{run_id}.json")
        warnings.warn(
            f"shard {Shard(number, self.shard.of)} of run {run_id} does not go with shard "
            f"{self.shard}, since their {differs} differ, and is set aside: run it again",
            stacklevel=2,
        )

    def _part(self, run_id: str, number: int) -> Record | None:
        """One of the shards, where it is whole; the lock is held, so that nobody writes it now."""
        store = self._store(run_id, number)
        part, path = store.find(run_id), store.records / f"{run_id}.json"
        if part is None and path.exists():  # torn or edited: out of the way
            set_aside(path)
        return part

    def _store(self, run_id: str, number: int) -> Store:
        return Store(self._folder(run_id) / f"{number}-of-{self.shard.of}")

    def _folder(self, run_id: str) -> Path:
        return self.store.folder / "shards" / run_id

    def _lock(self) -> FileLock:
        """One for all runs: not that of the store, which adding the whole record takes."""
        folder = self.store.folder / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock")


def _kind(part: Record) -> dict[str, Any]:
    """What shards have to agree in, beyond the run id."""
    learned = part["learned"]
    return {
        "batches": part["shard"]["layout"],
        "weights": [part["weights"]["sha256"], *(about["sha256"] for about in learned.values())],
        "draws": part["eot"],
        "sources": part["attack_report"].get("sources"),  # of a transfer attack
        "preparation": part["preparation_passes"],
    }


def folded(
    parts: Sequence[Record], stores: Sequence[Store], fold_reports: FoldReports
) -> tuple[Record, Outcomes]:
    """The record of a run in one piece, from the parts of all its shards, in order.

    The first one did what is done once: it made the checks and the certificate.
    """
    first = parts[0]
    run_id = first["run_id"]
    outcomes = fold(
        [store.examples(run_id) for store in stores],
        [Cost(*cost) for part in parts for cost in part["shard"]["costs"]],
        radii_at_once=first["radii_at_once"],
        batch_size=min(part["batch_size"] for part in parts),
        layout=Layout(**first["shard"]["layout"]),
    )
    # An attack that was never called says nothing of what it did.
    busy = [part for part in parts if any(part["passes_per_attacked_image"].values())]
    environments = [part["environment"] for part in parts]
    others = [each for each in environments[1:] if each != environments[0]]
    record = {
        **first,
        **measured(
            outcomes,
            first["perturbation"]["norm"],
            len(first["dataset"]["classes"]),
            first["detection"] or {},
        ),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "attack_report": dict(fold_reports([part["attack_report"] for part in busy or parts])),
        "seconds": {
            "training": first["seconds"]["training"],
            "preparation": sum(part["seconds"]["preparation"] for part in parts),
            "attack": outcomes.attack_seconds,
            "judge": outcomes.judge_seconds,
        },
        "environment": {**environments[0], **({"other_shards": others} if others else {})},
    }
    record["config"] = {**record["config"], "force": any(p["config"]["force"] for p in parts)}
    for key in ("shard", *OF_A_STORE):
        record.pop(key, None)
    return record, outcomes


def check_batches(
    shard: Shard, attack: Attack, points: Sequence[Point], images: int, batch_size: int
) -> None:
    """Raise `UserError` where there are fewer batches than shards, before a model is trained.

    A random victim may turn out to have fewer: its radii share none.
    """
    images_of = radii_in_a_batch(
        attack, [point.threat.epsilon for point in points], randomized=False
    )
    shard.rows(images, at_once=max(1, batch_size // images_of), images_of=images_of)


def show_parts(
    shards: Shards, run_ids: Sequence[str], console: Console, *, measured_now: bool
) -> None:
    """Say what this shard found and which are missing, for runs that are not whole yet."""
    state = "recorded" if measured_now else "recorded before, not run again"
    for run_id in run_ids:
        part = shards.partial(run_id)
        if part is None:  # set aside or folded by another process in the meantime
            continue
        clean, robust = (part[f"{key}_accuracy"]["value"] for key in ("clean", "robust"))
        labels = part["labels"]
        for sentence in (
            f"shard {shards.shard} {state}: {part['n']} images; missing: "
            f"{', '.join(map(str, shards.missing(run_id)))}",
            f"partial, of these images alone: clean {100 * clean:.2f}%, robust "
            f"{100 * robust:.2f}% ({labels['attack']}, {labels['norm']} "
            f"{radius_in_words(labels['epsilon'])}); run {run_id}",
        ):
            console.print(escape(sentence), soft_wrap=True, highlight=False)

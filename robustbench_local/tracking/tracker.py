"""What a tracker is, and what it is told: all comes from the record, which is written before."""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from omegaconf import DictConfig

from robustbench_local.building import build
from robustbench_local.display import Display
from robustbench_local.errors import UserError
from robustbench_local.results.leaderboard import starred
from robustbench_local.results.store import Record


@dataclass(frozen=True)
class Entry:
    """A finished run as trackers see it."""

    record: Record
    epochs: Sequence[Mapping[str, Any]]  # of the training, where its weights are in the cache

    @property
    def run_id(self) -> str:
        """By which a tracker knows what it was told already."""
        return str(self.record["run_id"])

    @property
    def name(self) -> str:
        """For people: who attacked whom, and how far."""
        labels = self.record["labels"]
        return " ".join(str(labels[key]) for key in ("model", "defense", "attack", "epsilon"))

    def parameters(self) -> dict[str, bool | int | float | str]:
        """Every setting under its dotted key; lists and null as JSON writes them."""
        return dict(_flat(self.record["config"]))

    def metrics(self) -> dict[str, float]:
        """The numbers of the record that are worth a curve or a column."""
        record = self.record
        found: dict[str, Any] = {"attack_success_rate": record["attack_success_rate"]}
        for which in ("clean", "robust"):
            accuracy = record[f"{which}_accuracy"]
            found[f"{which}_accuracy"] = accuracy["value"]
            found |= {f"{which}_accuracy_{end}": accuracy[end] for end in ("low", "high")}
        found["target_success_rate"] = record["target_success_rate"]
        found |= {f"seconds.{key}": value for key, value in record["seconds"].items()}
        for key in ("passes_per_attacked_image", "preparation_passes"):
            found |= {f"{key}.{way}": count for way, count in record[key].items()}
        for key, value in (record.get("detection") or {}).items():
            found[f"detection.{key}"] = value
        for radius, share in ((record.get("certified") or {}).get("radii") or {}).items():
            found[f"certified_accuracy.{radius}"] = share["value"]
        return {
            key: float(value)
            for key, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def tags(self) -> dict[str, str]:
        """Who the run is, and what there is to doubt; a star: it withholds the rank."""
        record = self.record
        labels = {key: str(value) for key, value in record["labels"].items()}
        return {
            "run_id": self.run_id,
            "comparability": record["comparability"],
            "flags": starred(record["flags"]),
            **labels,
        }

    def epoch_metrics(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Each epoch of the training, from 1, and its numbers."""
        for number, epoch in enumerate(self.epochs, 1):
            numbers = {
                f"training.{key}": float(value)
                for key, value in _flat(epoch)
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            numbers.pop("training.epoch", None)
            yield number, numbers


@dataclass(frozen=True, kw_only=True)
class Tracker(ABC):
    """Is told of finished runs, each once. Subclasses are a YAML file in `conf/tracking/` each."""

    needs: ClassVar[str]
    """What to type behind `pip install` for the packages it needs."""

    @abstractmethod
    def load(self) -> object:
        """Import what it needs; raises `ImportError`."""

    @abstractmethod
    def log(self, entry: Entry, results: Path) -> None:
        """Tell of a run unless it was told of before; raises whatever goes wrong.

        `results` is the folder of the records, below which its own store lies by default.
        """


def build_tracker(node: DictConfig | None) -> Tracker | None:
    """The tracker of a configuration, None for `tracking=none`.

    Raises `UserError` where a package is missing, before anything else is done.
    """
    if not node:
        return None
    tracker = build(node)
    if not isinstance(tracker, Tracker):
        raise UserError(
            f"tracking._target_={node.get('_target_')} makes no tracker but "
            f"{type(tracker).__name__}; derive the class from robustbench_local.tracking.Tracker"
        )
    try:
        with _quiet():
            tracker.load()
    except ImportError as error:
        raise UserError(
            f"tracking={type(tracker).__name__.lower()} needs a package that is not installed "
            f"({error}); type pip install {tracker.needs}, or tracking=none"
        ) from None
    return tracker


def track(
    tracker: Tracker | None, records: Sequence[Record], results: Path, cache: Path, display: Display
) -> None:
    """Tell a tracker of the records that it does not know; what goes wrong is one sentence.

    One process at a time, so that no run is told twice.
    """
    if tracker is None:
        return
    for record in records:
        try:
            with FileLock(results / ".tracking.lock"), _quiet():
                tracker.log(Entry(record, _epochs(record, cache)), results)
        except Exception as error:  # of a server, a disk or the library: the record is safe
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            display.say(
                f"tracking: run {record['run_id']} could not be logged ({reason}); its record is "
                "written, and the same command logs it once that is mended"
            )


def _quiet() -> warnings.catch_warnings:
    """The libraries warn of themselves and each other."""
    return warnings.catch_warnings(action="ignore")


def _epochs(record: Record, cache: Path) -> list[Mapping[str, Any]]:
    """The history of the training whose weights were attacked; empty where the cache has none."""
    try:
        about = json.loads((cache / "weights" / f"{record['weights']['key']}.json").read_text())
        known = about["sha256"] == record["weights"]["sha256"]
        return list(about["history"]) if known else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _flat(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested settings, with its dotted key."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{above}{key}", value
        else:
            yield f"{above}{key}", json.dumps(value)

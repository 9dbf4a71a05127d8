"""Weights and unfinished trainings on disk."""

import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import SoftFileLease
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustbench_local.files import atomic_path, remove_leftovers, set_aside
from robustbench_local.identity import file_sha256
from robustbench_local.leases import holder, lease_at, take
from robustbench_local.training.course import Course, Training

if TYPE_CHECKING:
    from rich.console import Console

_FORMAT = 1


class LeaseLost(Exception):
    """Another process took the training over, since this one gave no sign of life for so long."""


class Shelf:
    """Where the weights of one key lie: `weights/<key>.safetensors`, and a `.json` about them.

    The JSON file is written last and names the hash of the other; without it nothing counts.
    `notes` collects sentences about what was found damaged.
    """

    def __init__(self, cache: Path, key: str) -> None:
        self.key = key
        self.weights = cache / "weights" / f"{key}.safetensors"
        self.about = cache / "weights" / f"{key}.json"
        self.state = StateFile(cache / "training" / f"{key}.pt", key, self)
        self.notes: list[str] = []

    def find(self, *, repair: bool = False) -> dict[str, Any] | None:
        """What is known about the weights, or None where they are missing or damaged.

        With `repair`, under the lock only, damaged files are put out of the way.
        """
        if repair:
            remove_leftovers(self.weights)
            remove_leftovers(self.about)
        if not self.about.exists():
            return None
        try:
            about: dict[str, Any] = json.loads(self.about.read_text("utf-8"))
            if about["format"] != _FORMAT or about["key"] != self.key:
                raise ValueError("it belongs to something else")
            if file_sha256(self.weights) != about["sha256"]:
                raise ValueError("its content does not have the recorded SHA-256")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if repair:
                self.damaged(self.about, error)
                if self.weights.exists():
                    set_aside(self.weights)
            return None
        return about

    def read(self) -> dict[str, Tensor]:
        """The weights themselves, on the CPU."""
        return load_file(self.weights)

    def write(self, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Any]:
        """Keep weights, then what is known about them, under the lock; returns the latter."""
        with atomic_path(self.weights) as temporary:
            save_file(dict(weights), temporary)
        complete = {
            "format": _FORMAT,
            "key": self.key,
            **about,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "sha256": file_sha256(self.weights),
        }
        with atomic_path(self.about) as temporary:
            temporary.write_text(json.dumps(complete, indent=1) + "\n", "utf-8")
        self._note_training(complete)
        return complete

    def damaged(self, path: Path, error: BaseException) -> None:
        """Put a file out of the way and say so."""
        reason = " ".join(str(error).split())[:200]
        target = set_aside(path)
        self.notes.append(
            f"cache_damaged: {path.name} could not be used ({reason}); it was renamed to "
            f"{target.name} and the training done again"
        )

    @contextmanager
    def lock(self, console: "Console | None") -> Iterator["Hold"]:
        """Keep other processes from training the same weights; wait where one already does.

        See `leases`: a holder that died is replaced.
        """
        folder = self.state.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        lease = lease_at(folder / f"{self.key}.lease")
        told = False

        def wait() -> None:
            nonlocal told
            if not told and console is not None:
                console.print(
                    f"{holder(lease)} trains the same weights; waiting for it to end",
                    soft_wrap=True, highlight=False, markup=False,
                )  # fmt: skip
            told = True

        take(lease, wait)
        try:
            yield Hold(lease)
        finally:
            lease.release()

    def _note_training(self, about: Mapping[str, Any]) -> None:
        """Add a line to the list of finished trainings; under the lock, so that none gets lost."""
        self.state.path.parent.mkdir(parents=True, exist_ok=True)
        line = {
            "key": self.key,
            "sha256": about["sha256"],
            "processes": about.get("processes", 1),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with (self.state.path.parent / f"{self.key}.log").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def trainings(cache: Path) -> list[dict[str, Any]]:
    """Every training that was finished into this cache, and by whom; taking weights adds none."""
    files = sorted((cache / "training").glob("*.log"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


class Hold:
    """The right to train certain weights, as long as nobody took it over."""

    def __init__(self, lease: SoftFileLease) -> None:
        self._lease = lease

    def check(self) -> None:
        """Raise `LeaseLost` where another process holds it now: one that was stopped wakes up."""
        for _ in range(3):
            if self._lease.compromise is not None:
                break
            if (owner := self._lease.owner) is not None:
                if owner.token == self._lease.token:
                    return
                break
            time.sleep(0.1)  # a network file system may fail for a moment
        raise LeaseLost


@dataclass(frozen=True)
class StateFile:
    """A training that is not finished: written after every epoch, removed at the end."""

    path: Path
    key: str
    shelf: Shelf

    def load(self, training: Training) -> Course:
        """The course so far, with `training` put back to its end; a new one where there is none."""
        remove_leftovers(self.path)
        course = Course()
        if not self.path.exists():
            return course
        fresh = training.state()
        fresh = {**fresh, "model": _copy(fresh["model"]), "average": _copy(fresh["average"])}
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["format"] != _FORMAT or state["key"] != self.key:
                raise ValueError("it belongs to another training")
            training.restore(state["training"])
            course.restore(state["course"])
        except Exception as error:  # a torn file raises whatever its bytes happen to mean
            training.restore(fresh)
            self.shelf.damaged(self.path, error)
            return Course()
        return course

    def save(self, training: Training, course: Course) -> None:
        """Replace the file by the state as it is now."""
        state = {
            "format": _FORMAT,
            "key": self.key,
            "training": training.state(),
            "course": course.state(),
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def remove(self) -> None:
        """Forget the training."""
        self.path.unlink(missing_ok=True)


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights.items()}

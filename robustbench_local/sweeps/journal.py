"""What the runs of a sweep leave for the process that launched them, whatever carries them there.

Return values do not do: some launchers lose those of every run where one is killed.
"""

import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock, Timeout

from robustbench_local.files import atomic_path

VARIABLE = "ROBUSTBENCH_LOCAL_SWEEP"
"""The environment variable that tells a run the folder of its sweep's journal."""

_STALE = 7 * 24 * 3600
"""Seconds: a dead sweep may have runs in the queue of a cluster, whose files lie in its folder."""


@dataclass(frozen=True)
class Entry:
    """What is known of one launched job: it is `running`, or has ended as `done` or `failed`.

    `seconds` are those on the wall, `error` is one sentence.
    """

    number: int
    overrides: Sequence[str]
    state: Literal["running", "done", "failed"]
    host: str
    pid: int
    run_ids: Sequence[str] = ()
    error: str = ""
    seconds: float = 0.0

    @property
    def lives(self) -> bool:
        """Whether its process may still end it; that of another machine always may."""
        if self.state != "running" or self.host != socket.gethostname():
            return self.state == "running"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's: the number was given away again
            return False
        return True


@dataclass(frozen=True)
class Info:
    """What every job of a sweep has to know.

    `gpus` are dealt out among `workers` processes on one machine, of `threads` each; where the
    launcher does that itself there are none. `alone`: it is the only one and shows its own table.
    """

    host: str
    pid: int
    folder: str
    gpus: Sequence[str] = ()
    workers: int = 1
    threads: int | None = None
    alone: bool = False


@dataclass(frozen=True)
class Journal:
    """A folder below the cache: `sweep.json`, and a file for each job that was launched."""

    folder: Path

    @classmethod
    def choose(cls, cache: Path) -> Self:
        """One for a new sweep; nothing is written yet."""
        name = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(4)
        return cls((cache / "sweeps" / name).absolute())

    @classmethod
    def current(cls) -> Self | None:
        """That of the sweep which this run belongs to."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    @property
    def lock(self) -> FileLock:
        """Held by the launching process as long as it lives."""
        return FileLock(self.folder / "alive.lock")

    def open(self, info: Info) -> None:
        """Begin; what dead sweeps left long ago is removed."""
        for other in self.folder.parent.iterdir() if self.folder.parent.is_dir() else ():
            with suppress(OSError):
                _remove_stale(other)
        self._write("sweep", asdict(info))

    def info(self) -> Info:
        """What `open` was given."""
        return Info(**json.loads((self.folder / "sweep.json").read_text("utf-8")))

    def begin(self, number: int, overrides: Sequence[str]) -> Entry:
        """Say that a job runs in this process."""
        entry = Entry(number, list(overrides), "running", socket.gethostname(), os.getpid())
        self.write(entry)
        return entry

    def end(
        self, entry: Entry, seconds: float, *, run_ids: Sequence[str] = (), error: str = ""
    ) -> None:
        """Say how it ended."""
        state: Literal["done", "failed"] = "failed" if error else "done"
        self.write(replace(entry, state=state, run_ids=list(run_ids), error=error, seconds=seconds))

    def write(self, entry: Entry) -> None:
        """Keep it where that can be: a full disk must not take the result of a run with it."""
        with suppress(OSError):
            self._write(str(entry.number), asdict(entry))

    def forget(self, entry: Entry) -> None:
        """As if the job had never begun: it was interrupted."""
        with suppress(OSError):
            (self.folder / f"{entry.number}.json").unlink()

    def read(self, number: int) -> Entry | None:
        """What a job has said; None where that is nothing, or cannot be read."""
        try:
            return Entry(**json.loads((self.folder / f"{number}.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def numbers(self) -> list[int]:
        """The jobs that have said anything."""
        try:
            return [int(name[:-5]) for name in os.listdir(self.folder) if name[:-5].isdecimal()]
        except OSError:
            return []

    def remove(self) -> None:
        """All of it, where nothing is left to be told."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with atomic_path(self.folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(content), "utf-8")


def _remove_stale(folder: Path) -> None:
    newest = max((path.stat().st_mtime for path in (folder, *folder.iterdir())), default=0.0)
    if time.time() - newest < _STALE:
        return
    lock = Journal(folder).lock
    try:
        lock.acquire(timeout=0)
    except Timeout:  # it lives
        return
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)

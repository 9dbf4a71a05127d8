"""One immutable record per run: a JSON file with the numbers, an NPZ file with every example."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from filelock import FileLock

from robustbench_local.errors import UserError
from robustbench_local.evaluation.evaluate import PerExample
from robustbench_local.files import atomic_path, remove_leftovers
from robustbench_local.identity import file_sha256

Record: TypeAlias = dict[str, Any]
"""A record as JSON holds it; `results/README.md` lists its keys."""

RECORD_VERSION = 4
"""What is written. Versions from `OLDEST` are read: they lack what was added since."""

OLDEST = 3


@dataclass(frozen=True)
class Store:
    """The records below a results folder, `records/<run_id>.json` and `.npz` beside it.

    The JSON file is written last and names the SHA-256 of the other: it is what makes a run count.
    """

    folder: Path

    @property
    def records(self) -> Path:
        """Where the records lie."""
        return self.folder / "records"

    def lock(self) -> FileLock:
        """Held by whoever writes into the folder."""
        return FileLock(self.folder / ".lock")

    def add(self, record: Record, examples: PerExample) -> None:
        """Write a record; readers see either all of it or nothing."""
        self.records.mkdir(parents=True, exist_ok=True)
        path = self.records / f"{record['run_id']}.npz"
        with self.lock():
            for name in (path, path.with_suffix(".json")):
                remove_leftovers(name)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **asdict(examples))
            record = {**record, "examples_sha256": file_sha256(path)}
            with atomic_path(path.with_suffix(".json")) as temporary:
                text = json.dumps(record, indent=1, allow_nan=False)
                temporary.write_text(text + "\n", "utf-8")

    def find(self, run_id: str) -> Record | None:
        """The record of a run, or `None` where it is missing or damaged."""
        path = self.records / f"{run_id}.json"
        return self._read(path) if path.exists() else None

    def all(self) -> Iterator[Record]:
        """Every whole record, in order of its run id; damaged ones are named in a warning."""
        for path in sorted(self.records.glob("*.json")):
            record = self._read(path)
            if record is not None:
                yield record

    def examples(self, run_id: str) -> PerExample:
        """What happened to each example of a run."""
        with np.load(self.records / f"{run_id}.npz", allow_pickle=False) as arrays:
            none = np.zeros((len(arrays["labels"]), 0), np.float16)  # older than the field
            return PerExample(
                *(arrays.get(field.name, none) for field in fields(PerExample)),
            )

    def _read(self, path: Path) -> Record | None:
        try:
            record: Record = json.loads(path.read_text("utf-8"))
            known = OLDEST <= record["version"] <= RECORD_VERSION
            if not known or record["run_id"] != path.stem:
                raise ValueError("another version or another run")
            if file_sha256(path.with_suffix(".npz")) != record["examples_sha256"]:
                raise ValueError("its examples are damaged")
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"record {path.name} is not counted: {error}", stacklevel=2)
            return None
        return record


def check_writable(folder: Path, key: str) -> None:
    """Raise `UserError` where nothing could be written below `folder`; creates nothing.

    `key` is the setting the folder comes from.
    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"{key}={folder} cannot be written ({error.strerror or error}); type {key}=DIR with a "
            "folder you may write to"
        ) from None

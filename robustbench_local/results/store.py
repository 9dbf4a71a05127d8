"""One immutable record per run: a JSON file with the numbers, an NPZ file with every example."""

import errno
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from robustbench_local.errors import UserError
from robustbench_local.evaluation.evaluate import PerExample
from robustbench_local.results.integrity import (
    Damaged,
    Newer,
    Record,
    UnknownVersion,
    check_examples,
    encode,
    read,
)
from robustbench_local.results.merging import MergeReport, merge
from robustbench_local.results.migration import RECORD_VERSION
from robustbench_local.results.summary import FOLDED, Summary, for_leaderboard, summarise
from robustbench_local.results.writing import finish, replace_both, set_both_aside

__all__ = ["RECORD_VERSION", "Record", "Store", "check_writable"]

T = TypeVar("T")

_ATTEMPTS = 20
"""How often a record is written where another machine writes the same one at the same time."""


@dataclass(frozen=True)
class Store:
    """The records below a results folder, `records/<run_id>.json` and `.npz` beside it.

    The JSON file gets its name last, holds a checksum of itself and names the SHA-256 of the other:
    it is what makes a run count. An NPZ file alone was left by a killed writer, counts for nothing
    and is replaced when the run is repeated.

    Safety rests on files being replaced whole and on these checks, not on the lock: that keeps
    processes from disturbing each other, but on a shared file system it may not reach across
    machines. Reading takes no lock and needs no right to write.

    What is damaged is told in a warning and, where it `repairs`, set aside as `<name>.damaged`.
    """

    folder: Path
    repairs: bool = True

    @property
    def records(self) -> Path:
        """Where the records lie."""
        return self.folder / "records"

    def lock(self) -> FileLock:
        """Held by whoever writes into the folder; whoever holds it may take it again."""
        return FileLock(self.folder.absolute() / ".lock", is_singleton=True)

    def add(self, record: Record, examples: PerExample) -> None:
        """Write a record; readers see either all of it or nothing, and where it fails the old one.

        Raises `OSError` that names the file, and `UserError` where a newer version of this package
        has recorded the run.
        """
        path = self._path(record["run_id"])
        arrays = BytesIO()
        np.savez_compressed(arrays, **asdict(examples))
        whole = {
            **record,
            "examples_sha256": sha256(arrays.getbuffer()).hexdigest(),
            "examples_bytes": arrays.getbuffer().nbytes,
            "leaderboard": for_leaderboard(record, examples),
        }
        self.put(path.name, encode(whole), arrays.getvalue())

    def put(self, name: str, record: bytes, examples: bytes) -> None:
        """Write the two files of a record, the one called `name` last; raises what `add` raises."""
        path = self.records / name
        self.records.mkdir(parents=True, exist_ok=True)
        with self.lock():
            self._refuse_newer(path)
            for _ in range(_ATTEMPTS):
                try:
                    replace_both(path, record, examples)
                    check_examples(path, read(path))
                    return
                except (Damaged, FileNotFoundError):
                    # Another machine replaced one of the files, or removed it: not in step.
                    time.sleep(secrets.randbelow(100) / 1000)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    def find(self, run_id: str) -> Record | None:
        """The record of a run, or `None` where it is missing or, with a warning, does not count."""
        return self._look(self._path(run_id), _whole)

    def all(self) -> Iterator[Record]:
        """Every whole record, in order of its run id; what is damaged is told in a warning."""
        for path in self._paths():
            record = self._look(path, _whole)
            if record is not None:
                yield record

    def summaries(self) -> Iterator[Summary]:
        """What the leaderboard needs of each, several times as fast as `all`.

        Of records that hold their outcomes, the examples are checked by their size only: they are
        not read either.
        """
        pool: dict[str, object] = {}

        def look(path: Path) -> Summary:
            record = read(path, FOLDED)
            try:
                summary = summarise(record, pool)
            except (KeyError, TypeError, ValueError, AttributeError):
                raise Damaged("it lacks what a record says") from None
            check_examples(path, record, thoroughly=summary.packed is None)
            return summary

        for path in self._paths():
            summary = self._look(path, look)
            if summary is not None:
                yield summary

    def examples(self, run_id: str) -> PerExample:
        """What happened to each example of a run; raises `UserError` where it is not to be had."""
        arrays = self._arrays(run_id, [field.name for field in fields(PerExample)])
        none = np.zeros((len(arrays["labels"]), 0), np.float16)  # older than the field
        return PerExample(*(arrays.get(field.name, none) for field in fields(PerExample)))

    def outcomes(self, run_id: str) -> Mapping[str, NDArray[Any]]:
        """Of `examples` those arrays alone that make a worst case: reading all takes far longer."""
        return self._arrays(run_id, ["indices", "robust_correct", "robust_draws"])

    def merge(self, other: Path) -> MergeReport:
        """Fold in the records of another results folder; see `merging.merge`."""
        return merge(self, other)

    def _arrays(self, run_id: str, names: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        found = self._look(self._path(run_id), lambda path: _arrays(path, names))
        if found is None:
            raise UserError(
                f"run {run_id} has no whole record in {self.folder}; expected the id of a recorded "
                "run: run it again"
            )
        return found

    def _path(self, run_id: str) -> Path:
        return self.records / f"{run_id}.json"

    def _paths(self) -> list[Path]:
        names = sorted(os.listdir(self.records)) if self.records.is_dir() else []
        return [self.records / name for name in names if name.endswith(".json")]

    def _refuse_newer(self, path: Path) -> None:
        try:
            read(path)
        except Newer as error:
            raise UserError(
                f"{path} is not replaced: {error}, or type paths.results=DIR with another folder"
            ) from None
        except (OSError, Damaged, UnknownVersion):
            pass  # told where it is read

    def _look(self, path: Path, look: Callable[[Path], T]) -> T | None:
        """What `look` makes of a record; None where it is gone or, with a warning, does not count.

        Without the lock one may meet a record of which one file is replaced already: before it is
        called damaged, it is looked at again under the lock.
        """
        try:
            return look(path)
        except FileNotFoundError:
            return None
        except Damaged as error:
            told = self._look_again(path, look, error) if self.repairs else error
        except (UnknownVersion, OSError) as error:
            told = error
        if isinstance(told, Exception):
            warnings.warn(f"record {path.name} is not counted: {told}", stacklevel=4)
            return None
        return told

    def _look_again(
        self, path: Path, look: Callable[[Path], T], first: Damaged
    ) -> T | Exception | None:
        try:
            with self.lock():
                try:
                    return look(path)
                except FileNotFoundError:
                    return None
                except Damaged as error:
                    if finish(path):
                        return look(path)
                    set_both_aside(path)
                    return Damaged(f"{error}; set aside as {path.name}.damaged")
        except (Damaged, UnknownVersion) as error:
            return error
        except OSError as error:  # a folder that can be read only has no lock either
            return Damaged(f"{first}; it cannot be set aside ({error.strerror or error})")


def _whole(path: Path) -> Record:
    record = read(path)
    check_examples(path, record)
    return record


def _arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Those arrays beside a record that are there, of the very bytes that were checked."""
    record = read(path)
    try:
        data = path.with_suffix(".npz").read_bytes()
    except FileNotFoundError:
        raise Damaged("its examples are missing") from None
    if sha256(data).hexdigest() != record.get("examples_sha256"):
        raise Damaged("its examples are damaged")
    try:
        with np.load(BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in names if name in arrays}
        if {"indices", "labels", "robust_correct"} & set(names) <= found.keys():
            return found
    except (ValueError, TypeError, EOFError, BadZipFile):  # pickled objects among them
        pass
    raise Damaged("its examples are no arrays of ours") from None


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

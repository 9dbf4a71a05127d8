"""A record as bytes, and back: whatever is not exactly what was written is refused."""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

from robustbench_local.identity import file_sha256
from robustbench_local.results.migration import OLDEST, RECORD_VERSION, migrate

Record: TypeAlias = dict[str, Any]
"""A record as JSON holds it; `results/README.md` lists its keys."""

_HEAD = re.compile(rb'\{"checksum": "([0-9a-f]{64})",\n')


class Damaged(Exception):
    """A record that is torn, edited, of another run or nothing of ours at all."""


class UnknownVersion(Exception):
    """A record of a version that this code cannot read: nothing is wrong with it."""


class Newer(UnknownVersion):
    """One that the next version of this package has written."""


def encode(record: Record) -> bytes:
    """One JSON document whose first line holds the SHA-256 of all that follows it.

    Every key of the record begins a line of its own, one blank in: see `_some`.
    """
    rest = {key: value for key, value in record.items() if key != "checksum"}
    body = json.dumps(rest, indent=1, allow_nan=False).removeprefix("{\n").encode() + b"\n"
    return b'{"checksum": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body


def decode(data: bytes, only: Collection[str] | None = None) -> Record:
    """What `encode` wrote, or an older version of this package, as a record of today.

    With `only`, these keys of it where it has a checksum: parsing the others takes most of the
    time. Raises `Damaged` or `UnknownVersion`.
    """
    head = _HEAD.match(data)
    whole = head is not None and hashlib.sha256(data[81:]).hexdigest().encode() == head[1]
    partly = whole and only is not None
    try:
        record = _some(data[81:].decode(), only or ()) if partly else json.loads(data)
        version = record["version"]
        if not isinstance(version, int):
            raise Damaged("it is no record")
        if version > RECORD_VERSION:
            raise Newer(
                f"it is of version {version} and this robustbench_local knows {RECORD_VERSION}; "
                "upgrade it: pip install -U robustbench-local"
            )
        if version < OLDEST:
            raise UnknownVersion(f"it is of version {version}, older than any that can be read")
        if not whole and (version >= 5 or "checksum" in record):  # older ones never had one
            raise Damaged("its checksum is wrong")
        return migrate(record)
    except (Damaged, UnknownVersion):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("it is torn, or no record") from None


def read(path: Path, only: Collection[str] | None = None) -> Record:
    """The record of a file; its examples are not looked at. Raises `OSError` too."""
    record = decode(path.read_bytes(), only)
    if record.get("run_id") != path.stem:
        raise Damaged("it is the record of another run")
    return record


def check_examples(path: Path, record: Record, *, thoroughly: bool = True) -> None:
    """Raise `Damaged` where the examples beside the record `path` are not those it was written for.

    Not `thoroughly`: by their size alone, which costs no reading of them.
    """
    examples = path.with_suffix(".npz")
    try:
        size = record.get("examples_bytes")  # records before version 5 do not say
        if size is not None and examples.stat().st_size != size:
            raise Damaged("its examples are damaged")
        if (thoroughly or size is None) and file_sha256(examples) != record.get("examples_sha256"):
            raise Damaged("its examples are damaged")
    except FileNotFoundError:
        raise Damaged("its examples are missing") from None


def _some(text: str, only: Collection[str]) -> Record:
    """Some keys of a record that begins behind its first line, the others not even parsed."""
    parts = ("\n" + text.removesuffix("\n}\n")).split('\n "')[1:]
    kept = [part.removesuffix(",") for part in parts if part[: part.index('"')] in only]
    record: Record = json.loads('{"' + ',"'.join(kept) + "}")
    return record

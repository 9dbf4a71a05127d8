"""The two files of a record, replaced or moved together; call all of it under the store's lock."""

import os
from pathlib import Path

from robustbench_local.files import atomic_paths, remove_leftovers, set_aside
from robustbench_local.results.integrity import Damaged, UnknownVersion, check_examples, decode


def replace_both(path: Path, record: bytes, examples: bytes) -> None:
    """Write the record `path` and its examples; they get their names when both are on the disk.

    So a full disk leaves what was there before. `finish` mends what a kill between the two leaves.
    """
    both = (path.with_suffix(".npz"), path)
    for name in both:
        remove_leftovers(name)
    with atomic_paths(*both) as temporaries:
        for temporary, data in zip(temporaries, (examples, record), strict=True):
            temporary.write_bytes(data)


def finish(path: Path) -> bool:
    """Give a record its name whose writer was killed after the examples had theirs; tell if so."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        try:
            record = decode(leftover.read_bytes())
            check_examples(path, record)
        except (Damaged, UnknownVersion):
            continue
        if record["run_id"] == path.stem:
            os.replace(leftover, path)
            return True
    return False


def set_both_aside(path: Path) -> None:
    """Out of the way, and there to be studied."""
    for file in (path.with_suffix(".npz"), path):
        if file.exists():
            set_aside(file)

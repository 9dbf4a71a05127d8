"""Writing files so that a reader, or a crash, never meets half of one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which becomes `path` when the body has ended.

    The folder is created. The file reaches the disk before it gets its name, and it is removed
    where the body raises, `KeyboardInterrupt` included; `path` is then as it was. The temporary
    name ends in `.tmp`: write through an open file where a library goes by the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left; call it under a lock."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `<name>.damaged`: out of the way, and there to be studied."""
    target = path.with_name(f"{path.name}.damaged")
    os.replace(path, target)
    return target

"""Writing files so that a reader, or a crash, never meets half of one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_paths(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path for each, beside it, which becomes that path when the body has ended.

    Folders are created. All files reach the disk before the first gets its name, and they get their
    names in order. The temporary ones are removed where the body raises, `KeyboardInterrupt`
    included; the paths are then as they were. Temporary names end in `.tmp`: write through an open
    file where a library goes by the suffix. An `OSError` names a file: of a full disk it would not.
    """
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporaries = tuple(path.with_name(f".{path.name}.{token}.tmp") for path in paths)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(paths[-1])
        raise
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """`atomic_paths` for one file."""
    with atomic_paths(path) as (temporary,):
        yield temporary


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left; call it under a lock."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `<name>.damaged`: out of the way, and there to be studied."""
    target = path.with_name(f"{path.name}.damaged")
    os.replace(path, target)
    return target

"""Unpacking a foreign archive: nothing lands outside its folder, nothing fills the disk."""

import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from robustbench_local.data.source import one_line
from robustbench_local.errors import UserError

MAX_BYTES = 20 * 2**30
MAX_MEMBERS = 5_000_000


def unpack(archive: Path, target: Path) -> None:
    """Unpack a .zip or .tar.* file into `target`, which must not exist: all of it or nothing.

    The caller holds a lock, for the place that is written before the end is named after `target`.

    Raises `UserError` for an archive that is broken, too large, or holds absolute paths, "..",
    symbolic links, links that leave the folder, or devices.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    try:
        staging.mkdir()
        # Tar first: a tar that ends with a stored zip passes for a zip as well.
        if tarfile.is_tarfile(archive):
            _unpack_tar(archive, staging)
        elif zipfile.is_zipfile(archive):
            _unpack_zip(archive, staging)
        else:
            raise UserError(
                f"{archive} is no archive that can be read and .zip, .tar, .tar.gz, .tar.bz2 or "
                ".tar.xz was expected: type dataset.path=ARCHIVE or dataset.path=DIR"
            )
        os.replace(staging, target)
    # RuntimeError: what zipfile raises for encrypted members, a subclass of it for a compression
    # it does not know.
    except (
        tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError,
        RuntimeError,
    ) as error:  # fmt: skip
        raise UserError(
            f"{archive} can't be unpacked ({one_line(error)}) and a whole, unencrypted archive was "
            "expected: get it again, or unpack it yourself and type dataset.path=DIR"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unpack_tar(archive: Path, target: Path) -> None:
    budget = _Budget(archive)
    with tarfile.open(archive) as tar:
        # Member by member, not getmembers(): that would decompress everything twice.
        for member in tar:
            budget.spend(member.size)
            _check_name(archive, member.name)
            # Without symbolic links no later member can be led out through an earlier one.
            if member.islnk():
                _check_name(archive, member.linkname)
            elif not (member.isreg() or member.isdir()):
                kind = "a symbolic link" if member.issym() else "a device"
                raise _refusal(archive, f"{member.name} is {kind}")
            tar.extract(member, target, filter="data")


def _unpack_zip(archive: Path, target: Path) -> None:
    budget = _Budget(archive)
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            # Reading stops at the declared size, so what is declared is what can be written.
            budget.spend(member.file_size)
            # `filename` has been cleaned already, the original name has not.
            _check_name(archive, member.orig_filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refusal(archive, f"{member.filename} is a link or a device")
            packed.extract(member, target)


class _Budget:
    """Counts what an archive unpacks to and stops it at a size no dataset here has."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.members = 0
        self.size = 0

    def spend(self, size: int) -> None:
        """Count one member of `size` bytes."""
        self.members += 1
        self.size += size
        if self.size > MAX_BYTES or self.members > MAX_MEMBERS:
            raise UserError(
                f"{self.archive} unpacks to more than {MAX_BYTES / 2**30:g} GiB or {MAX_MEMBERS:,} "
                "files and less was expected: if it is what it should be, unpack it yourself and "
                "type dataset.path=DIR"
            )


def _check_name(archive: Path, name: str) -> None:
    """Refuse what is no plain path below the folder, on any system: backslash and drive too."""
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    if path.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise _refusal(archive, f"{name!r} leads out of the folder it is unpacked into")


def _refusal(archive: Path, finding: str) -> UserError:
    return UserError(
        f"{archive} was refused because {finding}, and plain files below one folder were expected: "
        "if you trust it, unpack it yourself and type dataset.path=DIR"
    )

"""A dataset from a folder of image files, or from an archive of one."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from robustbench_local.data.archive import unpack
from robustbench_local.data.pictures import Pictures, decode, read_cache, write_cache
from robustbench_local.data.source import Raw, Source, one_line
from robustbench_local.errors import UserError

_ARCHIVE_SUFFIX = re.compile(r"\.(zip|tgz|tbz2?|txz|tar(\.\w+)?)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """Image files as train/<class>/* and test/<class>/*, classes numbered by sorted name.

    `path` is a folder or a .zip or .tar.* of one. All images share one size; they become one
    channel where all are grey, else three. `name` is what is reported; the file's name without
    suffixes where it is None.
    """

    path: str | None = None
    name: str | None = None

    def read(self, data_dir: Path, cache_dir: Path) -> Raw:
        """Read the folder, or unpack the archive into the cache first; see `Source.read`."""
        if self.path is None:
            raise UserError("dataset=image_folder needs a place: type dataset.path=DIR_OR_ARCHIVE")
        path = Path(str(self.path)).expanduser()  # Hydra reads 123 as a number
        if path.is_dir():
            pictures = decode(path)
        elif path.is_file():
            pictures = _from_archive(path, cache_dir / "unpacked")
        else:
            raise UserError(
                f"{path} is not there and a folder or archive with train/<class>/* and "
                "test/<class>/* was expected: type dataset.path=DIR_OR_ARCHIVE"
            )
        return Raw(
            name=str(self.name or _ARCHIVE_SUFFIX.sub("", path.absolute().name)),
            source="files",
            x_train=_channels_first(pictures.x_train),
            y_train=torch.from_numpy(pictures.y_train),
            x_test=_channels_first(pictures.x_test),
            y_test=torch.from_numpy(pictures.y_test),
            class_names=pictures.class_names,
        )


def _from_archive(archive: Path, unpacked: Path) -> Pictures:
    """Decode an archive once; its content names the place of what was decoded."""
    try:
        with archive.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        unpacked.mkdir(parents=True, exist_ok=True)
        cache = unpacked / f"{key}.pixels.npz"
        with FileLock(unpacked / f"{key}.lock"):
            cached = read_cache(cache)
            if cached is not None:
                return cached
            folder = unpacked / key
            if not folder.is_dir():
                unpack(archive, folder)
            pictures = decode(folder)
            write_cache(cache, pictures)
            return pictures
    except OSError as error:
        raise UserError(
            f"{archive} can't be read or {unpacked} can't be written ({one_line(error)}) and both "
            "were expected: free the disk or type paths.cache=DIR"
        ) from error


def _channels_first(x: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()

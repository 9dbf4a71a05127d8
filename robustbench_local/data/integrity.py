"""Checks of dataset files on disk: missing, truncated and altered ones are found and named."""

import gzip
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from robustbench_local.errors import UserError

# torchvision knows the hashes of the packed files only, and looks at the unpacked ones no further
# than whether they exist.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def check_present(folder: Path, names: Sequence[str]) -> None:
    """Raise `UserError` that names the first missing file."""
    for name in names:
        if not (folder / name).is_file():
            packed = " (unpack the .gz file beside it)" if (folder / f"{name}.gz").exists() else ""
            raise UserError(
                f"{folder} is incomplete, {name} was expected there and is missing{packed}: put it "
                "back, or delete the folder and type dataset.source=download"
            )


def check_md5(folder: Path, expected: Mapping[str, str]) -> None:
    """Raise `UserError` that names the first missing, truncated or altered file."""
    check_present(folder, list(expected))
    for name, md5 in expected.items():
        found = _md5(folder / name)
        if found != md5:
            raise broken(folder / name, f"its MD5 is {found} and {md5} was expected")


def check_idx(folder: Path, packed_md5: Mapping[str, str]) -> bool:
    """Check the four files of an IDX dataset of 28x28 images in ten classes.

    Where the packed file lies beside, its MD5 and content vouch for the file; elsewhere header,
    size and label range must do. Returns whether all four were vouched for.
    """
    check_present(folder, list(MNIST_MD5))
    vouched = [_check_packed(folder / name, packed_md5[f"{name}.gz"]) for name in MNIST_MD5]
    for part in ("train", "t10k"):
        images, labels = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
        shape, _ = _read_idx(images, dims=3)
        if shape[1:] != (28, 28):
            raise broken(images, f"its images are {shape[1:]} and (28, 28) was expected")
        (count,), y = _read_idx(labels, dims=1)
        if count != shape[0]:
            raise broken(labels, f"it has {count} labels for {shape[0]} images")
        if y.max() > 9:
            raise broken(labels, f"label {y.argmax()} is {y.max()} and 0 to 9 was expected")
    return all(vouched)


def broken(path: Path, finding: str) -> UserError:
    """Make the error for a file whose content is wrong."""
    return UserError(
        f"{path} is truncated or altered, {finding}: delete its folder and type "
        "dataset.source=download, or type paths.data=DIR with an intact copy"
    )


def _check_packed(path: Path, md5: str) -> bool:
    packed = path.with_name(f"{path.name}.gz")
    if not packed.is_file():
        return False
    found = _md5(packed)
    if found != md5:
        raise broken(packed, f"its MD5 is {found} and {md5} was expected")
    try:
        content = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise broken(packed, "it can't be unpacked") from error
    if content != path.read_bytes():
        raise broken(path, f"it is not what {packed.name} beside it holds")
    return True


def _read_idx(
    path: Path, dims: int
) -> tuple[tuple[int, ...], np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """Read an IDX file: 2 zero bytes, type 8 (uint8), number of axes, big-endian sizes, data."""
    content = np.fromfile(path, dtype=np.uint8)
    start = 4 + 4 * dims
    if len(content) < start or content[:4].tolist() != [0, 0, 8, dims]:
        raise broken(path, f"an IDX header with {dims} axes of bytes was expected")
    shape = tuple(int(size) for size in content[4:start].view(">i4"))
    if min(shape) < 1 or len(content) != start + int(np.prod(shape, dtype=np.int64)):
        raise broken(path, f"it has {len(content)} bytes and its header says {shape}")
    return shape, content[start:]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

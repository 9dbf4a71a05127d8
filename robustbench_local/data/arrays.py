"""A dataset from one .npz file with x_train, y_train, x_test and y_test."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_local.data.source import Raw, Source, one_line
from robustbench_local.errors import UserError

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CONVERT = '(x * 255).round().astype("uint8")'

_Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Npz(Source):
    """Images and labels as NumPy arrays in one file.

    `x_*` are uint8 of shape (N, H, W, C), (N, C, H, W) or (N, H, W), with C 1 or 3; `y_*` are
    integers of shape (N,) or (N, 1), counting from 0. `name` is what is reported; the file's stem
    where it is None.
    """

    path: str | None = None
    name: str | None = None

    def read(self, data_dir: Path, cache_dir: Path) -> Raw:
        """Read the file; see `Source.read`."""
        if self.path is None:
            raise UserError("dataset=npz needs a file: type dataset.path=FILE.npz")
        path = Path(str(self.path)).expanduser()  # Hydra reads 123 as a number
        arrays = _read(path)
        x_train = _images(arrays["x_train"], "x_train", path)
        x_test = _images(arrays["x_test"], "x_test", path)
        if x_train.shape[1:] != x_test.shape[1:]:
            raise UserError(
                f"{path}: x_train has images of shape {tuple(x_train.shape[1:])} (C, H, W), x_test "
                f"of {tuple(x_test.shape[1:])}, and one shape was expected: save both alike and "
                "type dataset.path=FILE.npz again"
            )
        y_train = _labels(arrays["y_train"], "y_train", len(x_train), path)
        y_test = _labels(arrays["y_test"], "y_test", len(x_test), path)
        _check_range(y_train, "y_train", len(y_train) - 1, "one less than there are images", path)
        classes = int(y_train.max()) + 1
        _check_range(y_test, "y_test", classes - 1, "the largest label of y_train", path)
        return Raw(
            name=str(self.name or path.stem),
            source="files",
            x_train=x_train,
            y_train=torch.from_numpy(y_train.astype(np.int64)),
            x_test=x_test,
            y_test=torch.from_numpy(y_test.astype(np.int64)),
            class_names=tuple(str(k) for k in range(classes)),
        )


def _read(path: Path) -> dict[str, _Array]:
    expected = f"a .npz file with {', '.join(_KEYS)} was expected"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"{path} {what} and {expected}: type dataset.path=FILE.npz")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(
                    f"{path} holds a single array and {expected}: write it with "
                    "np.savez_compressed and type dataset.path=FILE.npz"
                )
            missing = [key for key in _KEYS if key not in archive.files]
            if missing:
                raise UserError(
                    f"{path} has no {' and no '.join(missing)} (it has "
                    f"{', '.join(archive.files) or 'nothing'}) and {expected}: add what is missing "
                    "with np.savez_compressed"
                )
            return {key: _array(archive, key) for key in _KEYS}
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy takes what it doesn't know for a pickle and says how to load that: don't pass it on.
        pickled = "pickle" in str(error)
        why = "not a zip file, or Python objects inside" if pickled else one_line(error)
        raise UserError(
            f"{path} can't be read ({why}) and {expected}, whole and without Python "
            "objects: write it again with np.savez_compressed"
        ) from error


def _array(archive: "np.lib.npyio.NpzFile", key: str) -> _Array:
    array = archive[key]
    # A member that is no .npy file comes back as bytes.
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{key} is no array")
    return array


def _images(x: _Array, key: str, path: Path) -> Tensor:
    """Give (N, C, H, W) uint8 whatever the layout was."""
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise UserError(
            f"{path}: {key} has shape {x.shape} and non-empty (N, H, W, C), (N, C, H, W) or "
            f"(N, H, W) was expected: save {key} that way and type dataset.path=FILE.npz again"
        )
    if x.dtype != np.uint8:
        raise UserError(
            f"{path}: {key} has dtype {x.dtype} with {_range(x)}, and uint8 from 0 to 255 was "
            f"expected: {_advice(x)}"
        )
    if x.ndim == 3:
        return torch.from_numpy(np.ascontiguousarray(x)).unsqueeze(1)
    first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
    if first == last:
        why = "both axes 1 and 3" if first else "neither axis 1 nor axis 3"
        raise UserError(
            f"{path}: {key} has shape {x.shape}, where {why} could be the 1 or 3 channels, and "
            "exactly one was expected: save grey images as (N, H, W), colour ones as (N, H, W, 3) "
            "with H not 1 or 3, and type dataset.path=FILE.npz again"
        )
    return torch.from_numpy(np.ascontiguousarray(x if first else x.transpose(0, 3, 1, 2)))


def _range(x: _Array) -> str:
    if x.dtype.kind not in "bfiu":
        return "no numbers"
    if x.dtype.kind == "f" and np.isnan(x).any():
        finite = x[~np.isnan(x)]
        rest = f" and {_span(finite)}" if finite.size else ""
        return f"NaN in {x.size - finite.size} of {x.size} values{rest}"
    return _span(x)


def _span(x: _Array) -> str:
    low, high = x.min() * 1, x.max() * 1  # a truth value becomes 0 or 1
    outside = x.dtype.kind == "f" and (low < 0 or high > 1)
    return f"values from {low:g} to {high:g}{' (outside [0, 1])' if outside else ''}"


def _advice(x: _Array) -> str:
    if x.dtype.kind == "f":
        inside = bool((x >= 0).all() and (x <= 1).all())
        return (
            f"convert with {_CONVERT}"
            if inside
            else f"bring the values into [0, 1] without NaN, then convert with {_CONVERT}"
        )
    if x.dtype.kind == "b":
        return f"convert with {_CONVERT}"
    return 'convert with x.astype("uint8") once all values are from 0 to 255'


def _labels(y: _Array, key: str, images: int, path: Path) -> _Array:
    """Give the labels as (N,), still in the file's dtype."""
    if y.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {key} has dtype {y.dtype} and whole numbers were expected: convert with "
            'y.astype("int64")'
        )
    if y.ndim not in (1, 2) or (y.ndim == 2 and y.shape[1] != 1):
        raise UserError(
            f"{path}: {key} has shape {y.shape} and (N,) or (N, 1) was expected: for one-hot "
            "labels convert with y.argmax(1)"
        )
    if len(y) != images:
        raise UserError(
            f"{path}: {key} has {len(y)} labels for {images} images and one each was expected: "
            "save x and y of the same images and type dataset.path=FILE.npz again"
        )
    return y.reshape(-1)


def _check_range(y: _Array, key: str, highest: int, meaning: str, path: Path) -> None:
    wrong = np.flatnonzero((y < 0) | (y > highest))
    if wrong.size:
        raise UserError(
            f"{path}: {key}[{wrong[0]}] is {y[wrong[0]]} and labels from 0 to {highest} "
            f"({meaning}) were expected: renumber the classes from 0 and save the file again"
        )

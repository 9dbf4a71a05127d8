"""A dataset ready for use: three splits on the device, named and fingerprinted."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustbench_local.data.source import Raw, Source
from robustbench_local.data.splits import choose_test, split_validation
from robustbench_local.errors import UserError
from robustbench_local.types import Images


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    `images` are uint8 (N, C, H, W) and `labels` int64 (N,), both on the compute device; `indices`
    are int64 (N,) on the CPU: the position of each image in the source's own train or test set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: Tensor | slice) -> Images:
        """Give the chosen rows as float32 in [0, 1], correctly rounded multiples of 1/255."""
        chosen = self.images[index].float()
        # A Python number would be turned into a multiplication by 1/255 on a GPU, which is off by
        # one rounding for some values: the same image must be the same numbers everywhere.
        return chosen.div_(torch.full((), 255.0, device=chosen.device))

    def to(self, device: torch.device | str) -> "Split":
        """Give the same split with images and labels on another device."""
        return Split(self.images.to(device), self.labels.to(device), self.indices)


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test images, and what makes them comparable.

    `source` is what was actually used ("files", "download" or "embedded"). `fingerprint` is the
    hex SHA-256 of pixels, labels and validation membership over the full sets, whatever
    `test_size`; `test_fingerprint` that of the chosen test images' positions. `test_total` is the
    size of the full test set. `notes` are to be shown loudly.
    """

    name: str
    source: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    test_total: int
    fingerprint: str
    test_fingerprint: str
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        channels, height, width = self.test.images.shape[1:]
        return channels, height, width


def load(source: Source, data_dir: Path, cache_dir: Path, device: torch.device | str) -> Dataset:
    """Read a source, split it, fingerprint it and put it on the device.

    Raises `UserError` when the data is missing, broken, or can't be split as asked.
    """
    _check_settings(source)
    raw = source.read(Path(data_dir).expanduser(), Path(cache_dir).expanduser())
    notes = raw.notes + _check(raw)
    kept, held = split_validation(raw.y_train, source.validation_fraction, source.split_seed)
    chosen = choose_test(raw.y_test, source.test_size, len(raw.class_names), source.split_seed)
    if len(chosen) < len(raw.y_test):
        notes += (
            f"subset: {len(chosen):,} of the {len(raw.y_test):,} test images of {raw.name}, "
            f"stratified by class and fixed by split_seed={source.split_seed}",
        )
    return Dataset(
        name=raw.name,
        source=raw.source,
        train=_rows(raw.x_train, raw.y_train, kept).to(device),
        validation=_rows(raw.x_train, raw.y_train, held).to(device),
        test=_rows(raw.x_test, raw.y_test, chosen).to(device),
        class_names=raw.class_names,
        test_total=len(raw.y_test),
        fingerprint=_sha256(raw.x_train, raw.y_train, raw.x_test, raw.y_test, held),
        test_fingerprint=_sha256(chosen),
        notes=notes,
    )


def _rows(x: Tensor, y: Tensor, index: Tensor) -> Split:
    return Split(x, y, index) if len(index) == len(x) else Split(x[index], y[index], index)


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.numpy())
        # Fixed byte order, and the shape in front: no two lists of arrays give the same bytes.
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _check_settings(source: Source) -> None:
    fraction, seed, size = source.validation_fraction, source.split_seed, source.test_size
    if (
        isinstance(fraction, bool)
        or not isinstance(fraction, int | float)
        or not 0 < fraction <= 0.5
    ):
        raise UserError(
            f"dataset.validation_fraction={fraction!r} came and a number above 0 and up to 0.5 was "
            "expected: type dataset.validation_fraction=0.05"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(
            f"dataset.split_seed={seed!r} came and a whole number from 0 was expected: type "
            "dataset.split_seed=0"
        )
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size <= 0):
        raise UserError(
            f"dataset.test_size={size!r} came and a whole number above 0 was expected: type "
            "dataset.test_size=1000, or dataset.test_size=null for the full test set"
        )


def _check(raw: Raw) -> tuple[str, ...]:
    """Refuse what no classifier can be trained on; note the classes nothing can be learnt about."""
    if len(raw.class_names) < 2:
        raise UserError(
            f"{raw.name} has {len(raw.class_names)} class and at least 2 were expected: add the "
            "other classes to the training set"
        )
    counts = torch.bincount(raw.y_train, minlength=len(raw.class_names))
    empty = [raw.class_names[k] for k in (counts == 0).nonzero().flatten().tolist()]
    if not empty:
        return ()
    return (
        f"{len(empty)} of the {len(raw.class_names)} classes of {raw.name} have no training image "
        f"(the first is {empty[0]}): labels should count from 0 without gaps",
    )

"""MNIST, FashionMNIST and CIFAR-10 through torchvision's own classes, checked file by file."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from robustbench_local.data import integrity
from robustbench_local.data.download import UnreachableError, fetch
from robustbench_local.data.embedded import read_embedded_mnist
from robustbench_local.data.source import Raw, Source
from robustbench_local.errors import UserError

_CHOICES = ("auto", "files", "download", "embedded")


@dataclass(frozen=True, kw_only=True)
class Official(Source):
    """A dataset that torchvision knows how to download and check.

    `source`: "files" takes only what lies in the data directory, "download" downloads what is not
    there, "embedded" is the small MNIST subset of a Python package, and "auto" tries these in turn.
    Files that are there but broken are always an error.
    """

    source: str = "auto"

    title: ClassVar[str]
    folder: ClassVar[str]
    torchvision_name: ClassVar[str]

    def read(self, data_dir: Path, cache_dir: Path) -> Raw:
        """Read from the first source that has the data; see `Source.read`."""
        if self.source not in _CHOICES:
            raise UserError(
                f"dataset.source={self.source!r} came and one of {', '.join(_CHOICES)} was "
                "expected: type dataset.source=auto"
            )
        if self.source == "embedded":
            return self._embedded("dataset.source=embedded asks for it")
        if self._present(data_dir):
            return self._read(data_dir, "files")
        if self.source == "files":
            raise UserError(
                f"{data_dir / self.folder} holds no {self.title} files and dataset.source=files "
                f"expects them there: type paths.data=DIR with the folder that holds "
                f"{self.folder}, or dataset.source=download"
            )
        try:
            fresh = fetch(
                data_dir=data_dir,
                folder=self.folder,
                urls=self._urls(),
                download=self._download,
                verify=lambda root: self._read(root, "download"),
                present=self._present,
            )
        except UnreachableError as error:
            return self._unreachable(f"{data_dir / self.folder} has no files and {error}", error)
        return self._read(data_dir, "download" if fresh else "files")

    def _unreachable(self, tried: str, error: UnreachableError) -> Raw:
        raise UserError(
            f"{self.title} could not be had, {tried}: type paths.data=DIR with the folder that "
            f"holds {self.folder}, or dataset=mnist, which can do without"
        ) from error

    def _embedded(self, why: str) -> Raw:
        raise UserError(
            f"dataset.source=embedded came for {self.title} and only mnist has an embedded subset: "
            "type dataset=mnist, or dataset.source=auto"
        )

    def _present(self, root: Path) -> bool:
        """Tell whether any of the files is there; a part of them must not pass for none."""
        return any((root / self.folder / name).exists() for name in self._traces())

    def _class(self) -> Any:
        import torchvision

        return getattr(torchvision.datasets, self.torchvision_name)

    def _download(self, root: Path) -> None:
        self._class()(root, download=True)

    @abstractmethod
    def _traces(self) -> Sequence[str]: ...

    @abstractmethod
    def _urls(self) -> Sequence[str]: ...

    @abstractmethod
    def _read(self, root: Path, source: str) -> Raw: ...


@dataclass(frozen=True, kw_only=True)
class Idx(Official):
    """A dataset of 28x28 grey images kept as four IDX files."""

    def _traces(self) -> Sequence[str]:
        return [name + suffix for name in integrity.MNIST_MD5 for suffix in ("", ".gz")]

    def _urls(self) -> Sequence[str]:
        base = self._class()
        return [f"{mirror}{base.resources[0][0]}" for mirror in base.mirrors]

    def _class(self) -> Any:
        # Old releases left processed/*.pt files, which torchvision would load unchecked in place
        # of the raw ones. The class keeps its name because that names the folder.
        return type(self.torchvision_name, (super()._class(),), {"_check_legacy_exist": _never})

    def _raw(
        self, root: Path, source: str, name: str, classes: tuple[str, ...], notes: tuple[str, ...]
    ) -> Raw:
        train, test = self._class()(root, train=True), self._class()(root, train=False)
        x_train, x_test = train.data.unsqueeze(1), test.data.unsqueeze(1)
        return Raw(name, source, x_train, train.targets, x_test, test.targets, classes, notes)


@dataclass(frozen=True, kw_only=True)
class MNIST(Idx):
    """The 70,000 handwritten digits, ten classes; a small part of them is always at hand."""

    title: ClassVar[str] = "MNIST"
    folder: ClassVar[str] = "MNIST/raw"
    torchvision_name: ClassVar[str] = "MNIST"

    def _unreachable(self, tried: str, error: UnreachableError) -> Raw:
        if self.source == "auto":
            return self._embedded(tried)
        raise UserError(
            f"{self.title} could not be downloaded, {tried}: type paths.data=DIR with the folder "
            f"that holds {self.folder}, or dataset.source=embedded for a small subset"
        ) from error

    def _embedded(self, why: str) -> Raw:
        return read_embedded_mnist(self.split_seed, why)

    def _read(self, root: Path, source: str) -> Raw:
        integrity.check_md5(root / self.folder, integrity.MNIST_MD5)
        return self._raw(root, source, "mnist", tuple(str(digit) for digit in range(10)), ())


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(Idx):
    """The 70,000 pieces of clothing, ten classes."""

    title: ClassVar[str] = "FashionMNIST"
    folder: ClassVar[str] = "FashionMNIST/raw"
    torchvision_name: ClassVar[str] = "FashionMNIST"

    def _read(self, root: Path, source: str) -> Raw:
        base = self._class()
        notes: tuple[str, ...] = ()
        if not integrity.check_idx(root / self.folder, dict(base.resources)):
            notes = (
                "FashionMNIST: sizes and labels were checked, but not the pixels, because the .gz "
                f"files whose hashes are known are not in {root / self.folder}",
            )
        return self._raw(root, source, "fashion_mnist", tuple(base.classes), notes)


@dataclass(frozen=True, kw_only=True)
class CIFAR10(Official):
    """The 60,000 small photographs, 32x32 in colour, ten classes."""

    title: ClassVar[str] = "CIFAR-10"
    folder: ClassVar[str] = "cifar-10-batches-py"
    torchvision_name: ClassVar[str] = "CIFAR10"

    def _traces(self) -> Sequence[str]:
        return list(self._md5())

    def _urls(self) -> Sequence[str]:
        return [str(self._class().url)]

    def _md5(self) -> dict[str, str]:
        base = self._class()
        lists = [*base.train_list, *base.test_list, (base.meta["filename"], base.meta["md5"])]
        return dict(lists)

    def _read(self, root: Path, source: str) -> Raw:
        integrity.check_present(root / self.folder, list(self._md5()))
        x_train, y_train, _ = self._part(root, train=True)
        x_test, y_test, classes = self._part(root, train=False)
        return Raw("cifar10", source, x_train, y_train, x_test, y_test, classes)

    def _part(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        try:
            with warnings.catch_warnings():
                # The files were pickled by an old NumPy, which a new one remarks on.
                warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
                part = self._class()(root, train=train)
        except RuntimeError:
            # torchvision found a wrong hash but does not say in which file.
            integrity.check_md5(root / self.folder, self._md5())
            raise
        x = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return x, torch.tensor(part.targets, dtype=torch.int64), tuple(part.classes)


def _never(_: object) -> bool:
    return False

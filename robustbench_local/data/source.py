"""What every kind of dataset gives: raw arrays, and the settings of how they are split."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Raw:
    """A dataset as its source has it, before any split.

    `x_*` are uint8 (N, C, H, W) and `y_*` int64 (N,), all on the CPU; `source` says where they came
    from ("files", "download" or "embedded") and `notes` what the user must know about them.
    """

    name: str
    source: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where a dataset comes from and how it is split; one subclass per kind of source.

    `validation_fraction` is the share of the training images held out, in (0, 0.5]; `split_seed`
    fixes every split; `test_size` chooses that many test images (None: all of them).
    """

    validation_fraction: float = 0.05
    split_seed: int = 0
    test_size: int | None = None

    @abstractmethod
    def read(self, data_dir: Path, cache_dir: Path) -> Raw:
        """Read the whole dataset.

        Files are looked for in `data_dir`; what can be made again goes to `cache_dir`. Raises
        `UserError` when the data is missing, broken or not what was declared.
        """


def one_line(error: BaseException) -> str:
    """Give an exception's first sentence as a clause that fits into a one-sentence message."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__

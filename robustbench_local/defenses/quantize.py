"""Fewer grey levels."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from robustbench_local.defenses.choices import require_one_of
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.errors import UserError
from robustbench_local.types import Images


class BitDepth(Preprocess):
    """Each pixel rounded to `bits` bits (Xu et al. 2018, arXiv:1704.01155): 1 to 8.

    Half-way pixels go to the even level, NumPy's `rint`; with one bit, 0.5 becomes 0. The BPDA
    surrogate is the identity: any rising one has the same sign of the gradient, hence the same
    linf attack.
    """

    def __init__(
        self, *, bits: int = 3, in_training: bool = False, at_run_time: bool = True
    ) -> None:
        super().__init__(in_training=in_training, at_run_time=at_run_time)
        self.bits = read_bits("defense.wrap.bit_depth.bits", bits, example=3)

    def transform(self, x: Images) -> Images:
        """See the class."""
        return nearest_step(x, 2**self.bits)


class Quantize(Preprocess):
    """Each pixel replaced by the nearest of a few levels.

    - `levels`: how many, equally spaced from 0 to 1 (half-way pixels go to the even one), or a list
      of two or more in [0, 1], ascending (half-way pixels go to the darker one).

    The BPDA surrogate is the identity, see `BitDepth`. The discretisation of Google's self-study
    course (20 levels) cuts [0, 1] into equal parts, for which the levels are 0.025, 0.075, ...
    0.975, and shows them to the network as one channel each, which this does not.
    """

    def __init__(
        self,
        *,
        levels: int | Sequence[float] = 20,
        in_training: bool = False,
        at_run_time: bool = True,
    ) -> None:
        super().__init__(in_training=in_training, at_run_time=at_run_time)
        self.levels = read_levels("defense.wrap.quantize.levels", levels)

    def transform(self, x: Images) -> Images:
        """See the class."""
        if isinstance(self.levels, int):
            return nearest_step(x, self.levels)
        levels = torch.tensor(self.levels, device=x.device, dtype=x.dtype)
        return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def nearest_step(x: Images, count: int) -> Images:
    """Pixels rounded to `count` equally spaced levels, 0 and 1 among them."""
    return (x * (count - 1)).round() / (count - 1)


def read_bits(key: str, bits: object, *, example: int) -> int:
    """The number of bits, or a `UserError`."""
    expected = "a whole number from 1 to 8"
    return require_one_of(key, bits, range(1, 9), expected=expected, example=example)


def read_levels(key: str, levels: object) -> int | tuple[float, ...]:
    """The number of levels or the levels themselves, or a `UserError`."""
    expected = "a whole number from 2 to 65536, or a list of levels in [0, 1]"
    if isinstance(levels, int) or not isinstance(levels, Sequence) or isinstance(levels, str):
        return require_one_of(key, levels, range(2, 2**16 + 1), expected=expected, example=20)
    plain = [level for level in levels if type(level) in (int, float) and 0 <= level <= 1]
    if len(plain) < len(levels) or len(plain) < 2 or any(a >= b for a, b in pairwise(plain)):
        raise UserError(
            f"{key}={list(levels)}; expected {expected}, ascending: type {key}=[0,0.5,1]"
        )
    return tuple(map(float, plain))

"""Random draws that belong to the example, not to the batch it happens to be in.

Every attack draws from a `Draws`: a counter-based generator keyed by (seed, the example's own
pixels). Hence the same image meets the same random start whichever batch, shard or set of surviving
neighbours it is evaluated with and, up to rounding, whichever kind of device; nothing touches the
global generators, and there is no state to save. Source of the mixing function: the "lowbias32"
integer hash (Wellons, public domain).
"""

import hashlib
from typing import Self

import torch
from torch import Tensor, nn

from robustbench_local.types import Images

_SIGN = 0x80000000


def _signed(value: int) -> int:
    """The int32 that has these 32 bits: torch has no arithmetic on unsigned integers."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & _SIGN else value


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (bits >> by).bitwise_and_((1 << (32 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = bits ^ _shift(bits, 16)
    bits = bits * _signed(0x7FEB352D)
    bits ^= _shift(bits, 15)
    bits *= _signed(0x846CA68B)
    bits ^= _shift(bits, 16)
    return bits


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same parts give the same seed on any machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def reseed(victim: nn.Module, seed: int) -> None:
    """Start the draws of every part with a `reseed` of its own anew, each from its own seed."""
    parts = [part for part in victim.modules() if hasattr(part, "reseed")]
    for number, part in enumerate(parts):
        part.reseed(derive_seed(seed, "wrap", number))  # type: ignore[operator]


class Draws:
    """An endless stream of random numbers for each example of a batch, all independent.

    `x` has shape (N, C, H, W) and any float type; two examples with equal pixels share a stream.
    """

    def __init__(self, x: Images, seed: int) -> None:
        pixels = (x.detach().flatten(1).double() * 0xFFFFFF).round().to(torch.int64)
        position = torch.arange(1, pixels.shape[1] + 1, device=x.device, dtype=torch.int64)
        # Two independent 32-bit hashes of the pixels: a sum, since its order cannot matter.
        first, second = (
            _mix((pixels * (2 * position + odd) + odd).to(torch.int32) ^ _signed(odd)).sum(1)
            for odd in (0x9E3779B1, 0x85EBCA77)
        )
        self._keys = torch.stack((first, second), 1).to(torch.int32)  # (N, 2)
        self._keys = _mix(self._keys ^ _signed(seed)) + _mix(self._keys + _signed(seed >> 32))
        self._round = 0

    def __getitem__(self, index: Tensor) -> Self:
        """The streams of some of the examples, from where they stand."""
        chosen = object.__new__(type(self))
        chosen._keys, chosen._round = self._keys[index], self._round
        return chosen

    def _bits(self, size: int) -> Tensor:
        self._round += 1
        counter = torch.arange(size, device=self._keys.device, dtype=torch.int32)
        counter = _mix(counter + _signed(self._round * 0x632BE5AB))
        return _mix(_mix(counter ^ self._keys[:, :1]) + self._keys[:, 1:])  # (N, size)

    def uniform(self, size: int) -> Tensor:
        """float32 in (0, 1), never 0 or 1, shape (N, size)."""
        return _shift(self._bits(size), 9).to(torch.float32).add_(0.5).mul_(2.0**-23)

    def normal(self, size: int) -> Tensor:
        """Standard normal float32, shape (N, size), by Box and Muller."""
        radius = self.uniform(size).log_().mul_(-2).sqrt_()
        return radius.mul_(self.uniform(size).mul_(2 * torch.pi).cos_())

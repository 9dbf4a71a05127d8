"""Rotations and translations: a set of perturbations that is no ball of any norm.

The grid of Engstrom et al. 2019 (arXiv:1712.02779): 31 rotations of up to 30 degrees by 5 x 5
translations of up to 10% of each side, in whole pixels at the ends (3 on sides of 28 and of 32).
An image is first turned about its centre, then moved; what comes from outside is black. Values
between pixels are interpolated bilinearly, so turns by 0 and moves by whole pixels are exact.
"""

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_local.types import Images

DEGREES = 30.0
"""The largest rotation."""

TOLERANCE = 1e-5
"""How far a pixel may be from the transformed image that `size` recognises it as."""

_ROTATIONS, _TRANSLATIONS = 31, 5


class Transform(NamedTuple):
    """Shares of the largest rotation (anticlockwise), and of the largest move right and down.

    Each lies in [-1, 1].
    """

    rotation: float
    right: float
    down: float

    @property
    def share(self) -> float:
        """The largest of them: how much of the allowed ranges the transform takes, in [0, 1]."""
        return max(map(abs, self))


@lru_cache
def grid(share: float = 1.0) -> tuple[Transform, ...]:
    """The grid inside this share of the ranges, without the identity, the least share first."""
    turns = (2 * i / (_ROTATIONS - 1) - 1 for i in range(_ROTATIONS))
    moves = [2 * i / (_TRANSLATIONS - 1) - 1 for i in range(_TRANSLATIONS)]
    every = (Transform(*shares) for shares in product(turns, moves, moves))
    inside = (transform for transform in every if 0 < transform.share <= share + 1e-9)
    # Of equal shares the one that does less besides; the last resort makes the order total.
    return tuple(sorted(inside, key=lambda t: (t.share, sum(map(abs, t)), t)))


def largest_move(side: int) -> int:
    """10% of a side of the image, in whole pixels."""
    return round(side / 10)


def apply(x: Images, transform: Transform) -> Images:
    """Every image, turned and then moved."""
    return _interpolate(x, transform, slice(None)).view(x.shape)


def _interpolate(x: Images, transform: Transform, pixels: slice) -> Tensor:
    """Some pixels of the transformed images, (N, C, P)."""
    places, weights = _corners(*x.shape[2:], transform)
    flat = x.flatten(2)
    total = torch.zeros_like(flat[:, :, pixels])
    for place, weight in zip(places[:, pixels], weights[:, pixels], strict=True):
        if weight.any():
            total += flat.index_select(2, place.to(x.device)) * weight.to(x)
    # Four weights of one pixel add up to 1 only up to rounding.
    return total.clamp_(0, 1)


@lru_cache(maxsize=1024)
def _corners(height: int, width: int, transform: Transform) -> tuple[Tensor, Tensor]:
    """The four source pixels of every pixel and what they count, (4, H*W), index and float64."""
    angle = math.radians(DEGREES * transform.rotation)
    down = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    right = torch.arange(width, dtype=torch.float64)[None] - (width - 1) / 2
    down = down - transform.down * largest_move(height)
    right = right - transform.right * largest_move(width)
    # Rows count downwards, so this undoes an anticlockwise turn as it is seen.
    row = math.cos(angle) * down + math.sin(angle) * right + (height - 1) / 2
    column = math.cos(angle) * right - math.sin(angle) * down + (width - 1) / 2
    top, left = row.floor(), column.floor()
    places, weights = [], []
    for i, j in product((0, 1), (0, 1)):
        weight = (row - top if i else top + 1 - row) * (column - left if j else left + 1 - column)
        inside = (top + i >= 0) & (top + i < height) & (left + j >= 0) & (left + j < width)
        place = (top + i).clamp(0, height - 1) * width + (left + j).clamp(0, width - 1)
        places.append(place.long().flatten())
        weights.append((weight * inside).flatten())
    return torch.stack(places), torch.stack(weights)


def size(x_adv: Images, x: Images) -> Tensor:
    """The least share of a transform that makes `x_adv` of `x`, float64, shape (N,).

    0 for the image itself, infinity for what no transform of the grid makes.
    """
    x_adv, x = x_adv.detach(), x.detach()
    sizes = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    same = _alike(x_adv, x)
    sizes[same] = 0
    unknown = (~same).nonzero().squeeze(1)
    # Most transforms are ruled out by a few pixels of the image.
    few = slice(None, None, max(1, x[0, 0].numel() // 32) if len(x) else None)
    for transform in grid():
        if len(unknown) == 0:
            break
        probe = x_adv[unknown].flatten(2)[:, :, few]
        likely = unknown[_alike(_interpolate(x[unknown], transform, few), probe)]
        if len(likely) == 0:
            continue
        found = likely[_alike(apply(x[likely], transform), x_adv[likely])]
        sizes[found] = transform.share
        unknown = unknown[~torch.isin(unknown, found)]
    return sizes


def _alike(first: Images, second: Images) -> Tensor:
    return (first - second).abs().flatten(1).amax(1) <= TOLERANCE

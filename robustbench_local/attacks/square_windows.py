"""The windows of the Square attack: where they lie, what is written into them, for all at once."""

from dataclasses import dataclass
from functools import cache
from math import sqrt

import torch
from torch import Tensor

from robustbench_local.randomness import Draws
from robustbench_local.types import Images

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After how many of 10,000 queries the share of changed pixels is halved (section 5 there)."""


@dataclass(frozen=True)
class Edit:
    """A window of every image, as flat positions, with its entries before and after.

    `spots` (N, 1, s*s), `old` and `new` (N, C, s*s).
    """

    spots: Tensor
    old: Tensor
    new: Tensor

    def write(self, images: Images, accepted: Tensor | None = None) -> None:
        """Put the new entries in place, or the old ones back where not `accepted`."""
        values = self.new
        if accepted is not None:
            values = torch.where(accepted.view(-1, 1, 1), self.new, self.old)
        images.flatten(2).scatter_(2, self.spots.expand_as(values), values)


def side_length(share: float, progress: float, x: Images, *, odd: bool) -> int:
    """The side of the windows when `progress` (0 to 1) of the queries is spent.

    `share` of the pixels at first. Under l2 (`odd`) the side is odd and at least 3.
    """
    halvings = sum(progress * 10_000 > bound for bound in _HALVINGS)
    height, width = int(x.shape[2]), int(x.shape[3])
    side = max(round(sqrt(share / 2.0**halvings * height * width)), 3 if odd else 1)
    if odd and side % 2 == 0:
        side += 1
    return min(side, height, width)


def stripes(x: Images, radius: Tensor, draws: Draws) -> Images:
    """The start under linf: vertical stripes, each channel and column all up or all down."""
    channels, width = x.shape[1], x.shape[3]
    signs = (draws.uniform(channels * width) - 0.5).sign().to(x.dtype)
    return (x + radius * signs.view(-1, channels, 1, width)).clamp_(0, 1)


def tiles(x: Images, radius: Tensor, draws: Draws) -> Images:
    """The start under l2: a grid of `eta` tiles, a fifth of the image wide, of random signs."""
    count, channels, height, width = x.shape
    side = max(1, min(height, width) // 5)
    down, across = height // side, width // side
    # Signs for each channel and tile, then an orientation for each tile.
    draw = draws.uniform((channels + 1) * down * across).view(count, -1, down, across)
    signs = (draw[:, :channels] - 0.5).sign().to(x.dtype)[..., None, None]
    shape = eta(side).to(x)
    tile = torch.where((draw[:, channels:] > 0.5)[..., None, None], shape, shape.T)
    grid = (signs * tile).transpose(3, 4).reshape(count, channels, down * side, across * side)
    delta = torch.zeros_like(x)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta[:, :, top : top + down * side, left : left + across * side] = grid
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta *= radius / length
    return (x + delta).clamp_(0, 1)


def propose_linf(x: Images, x_adv: Images, radius: Tensor, side: int, draws: Draws) -> list[Edit]:
    """A square of each image pushed to the edge of the ball, each channel up or down."""
    channels = x.shape[1]
    draw = draws.uniform(2 + channels)
    spots = _spots(x, *_corner(x, side, draw[:, :2]), side)
    push = radius.view(-1, 1, 1) * (draw[:, 2:] - 0.5).sign().to(x.dtype)[..., None]
    old, image = _read(x_adv, spots), _read(x, spots)
    new = (image + push).clamp_(0, 1)
    # A query about an unchanged image is wasted: then the other way.
    same = (new == old).flatten(1).all(1)
    new = torch.where(same.view(-1, 1, 1), (image - push).clamp_(0, 1), new)
    return [Edit(spots, old, new)]


def propose_l2(x: Images, x_adv: Images, radius: Tensor, side: int, draws: Draws) -> list[Edit]:
    """The budget of one window moved to another, whose content leans towards an `eta` shape.

    What is not spent (clipping leaves some) is added. No renormalisation is needed: the norm of
    the result is the radius by construction, before clipping.
    """
    channels = x.shape[1]
    draw = draws.uniform(5 + channels)
    to, source = _corner(x, side, draw[:, :2]), _corner(x, side, draw[:, 2:4])
    there, here = _spots(x, *source, side), _spots(x, *to, side)
    old, image = _read(x_adv, here), _read(x, here)
    taken, below = _read(x_adv, there), _read(x, there)

    held = old - image
    rows, columns = there // x.shape[3], there % x.shape[3]
    top, left = (corner.view(-1, 1, 1) for corner in to)
    apart = (rows < top) | (rows >= top + side) | (columns < left) | (columns >= left + side)
    own = held.square().sum(2, keepdim=True)
    budget = own + ((taken - below).square() * apart).sum(2, keepdim=True)  # of each channel
    total = (x_adv - x).flatten(1).square().sum(1).view(-1, 1, 1)
    budget += (radius.view(-1, 1, 1) ** 2 - total).clamp(min=0) / channels

    shape = eta(side).to(x)
    turned = (draw[:, 4] > 0.5).view(-1, 1, 1)
    shape = torch.where(turned, shape.flatten(), shape.T.flatten())  # (N, 1, s*s)
    shape = shape * (draw[:, 5:] - 0.5).sign().to(x.dtype)[..., None]
    shape = shape + held / (own.sqrt() + 1e-12)
    shape = shape * (budget.sqrt() / (shape.norm(dim=2, keepdim=True) + 1e-12))
    # In this order: where the windows overlap, the second one is what counts.
    return [Edit(there, taken, below), Edit(here, old, (image + shape).clamp_(0, 1))]


@cache
def eta(side: int) -> Tensor:
    """Two bumps of opposite sign, one above the other, of Euclidean length 1, (side, side).

    Each falls off from its centre in concentric rectangles, so that shifting budget there moves
    many neurons of a first layer a little.
    """
    upper = side // 2
    both = torch.cat((_bump(upper, side), -_bump(side - upper, side)))  # of length 1 each
    both /= torch.linalg.vector_norm(both)
    return both


def _bump(height: int, width: int) -> Tensor:
    """The sum of 1/k^2 over the rectangles around the centre that hold the entry."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns)
    rings = max(height // 2, width // 2) + 1
    weight: Tensor = 1 / torch.arange(1, rings + 1).double() ** 2
    tails = weight.flip(0).cumsum(0).flip(0)
    bump: Tensor = tails[ring]
    bump /= torch.linalg.vector_norm(bump)
    return bump


def _corner(x: Images, side: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Top row and left column of a window, every place in the image equally likely."""
    top = (draw[:, 0] * (x.shape[2] - side + 1)).long()
    return top, (draw[:, 1] * (x.shape[3] - side + 1)).long()


def _spots(x: Images, top: Tensor, left: Tensor, side: int) -> Tensor:
    """Flat positions of the window's pixels, (N, 1, side*side)."""
    reach = torch.arange(side, device=x.device)
    offsets = (reach[:, None] * x.shape[3] + reach).flatten()
    return (top * x.shape[3] + left).view(-1, 1, 1) + offsets


def _read(images: Images, spots: Tensor) -> Tensor:
    return images.flatten(2).gather(2, spots.expand(-1, images.shape[1], -1))

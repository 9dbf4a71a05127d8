"""The windows of the Square attack: where they lie, what is written into them, for all at once."""

from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from robustbench_local.randomness import Draws
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images

Length: TypeAlias = Literal[1, 2]
"""Which norm a budget is measured in."""

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

    `share` of the pixels at first. Under l2 and l1 (`odd`) the side is odd and at least 3.
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


def tiles_l2(x: Images, radius: Tensor, draws: Draws) -> Images:
    """The start under l2: `_tiles` at the length of the radius."""
    delta = _tiles(x, draws, 2)
    delta *= radius / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + delta).clamp_(0, 1)


def tiles_l1(x: Images, radius: Tensor, draws: Draws) -> Images:
    """The start under l1: `_tiles`, each of length 1, brought into ball and box together."""
    return _l1_ball(x, radius).project(x + _tiles(x, draws, 1), x)


def _tiles(x: Images, draws: Draws, norm: Length) -> Images:
    """A grid of `eta` tiles, a fifth of the image wide, of random signs."""
    count, channels, height, width = x.shape
    side = max(1, min(height, width) // 5)
    down, across = height // side, width // side
    # Signs for each channel and tile, then an orientation for each tile.
    draw = draws.uniform((channels + 1) * down * across).view(count, -1, down, across)
    signs = (draw[:, :channels] - 0.5).sign().to(x.dtype)[..., None, None]
    shape = eta(side, norm).to(x)
    tile = torch.where((draw[:, channels:] > 0.5)[..., None, None], shape, shape.T)
    grid = (signs * tile).transpose(3, 4).reshape(count, channels, down * side, across * side)
    delta = torch.zeros_like(x)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta[:, :, top : top + down * side, left : left + across * side] = grid
    return delta


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
    move = _move(x, x_adv, radius, side, draws, 2)
    new = (move.image + move.content).clamp_(0, 1)
    # In this order: where the windows overlap, the second one is what counts.
    return [Edit(move.there, move.taken, move.below), Edit(move.here, move.old, new)]


def propose_l1(x: Images, x_adv: Images, radius: Tensor, side: int, draws: Draws) -> list[Edit]:
    """As under l2, and the whole image brought into ball and box together.

    From Croce and Hein 2021 (arXiv:2103.01208), whose window takes the budget once for each
    channel; the projection then thins out the whole perturbation.
    """
    move = _move(x, x_adv, radius, side, draws, 1)
    tried = x_adv.clone()
    Edit(move.there, move.taken, move.below).write(tried)
    Edit(move.here, move.old, move.image + x.shape[1] * move.content).write(tried)
    tried = _l1_ball(x, radius).project(tried, x)
    everywhere = torch.arange(x[0, 0].numel(), device=x.device).expand(len(x), 1, -1)
    return [Edit(everywhere, x_adv.flatten(2).clone(), tried.flatten(2))]


class _Move(NamedTuple):
    """Two windows of every image, and what is to be in the one the budget goes to."""

    there: Tensor  # (N, 1, s*s), where it comes from
    taken: Tensor  # (N, C, s*s), the entries of the current point there
    below: Tensor  # and of the image
    here: Tensor
    old: Tensor
    image: Tensor
    content: Tensor  # the new perturbation here


def _move(x: Images, x_adv: Images, radius: Tensor, side: int, draws: Draws, norm: Length) -> _Move:
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
    # Sums of powers, which add up over the entries.
    own = held.abs().pow(norm).sum(2, keepdim=True)
    budget = own + ((taken - below).abs().pow(norm) * apart).sum(2, keepdim=True)  # by channel
    total = (x_adv - x).abs().pow(norm).flatten(1).sum(1).view(-1, 1, 1)
    budget += (radius.view(-1, 1, 1) ** norm - total).clamp(min=0) / channels

    shape = eta(side, norm).to(x)
    turned = (draw[:, 4] > 0.5).view(-1, 1, 1)
    shape = torch.where(turned, shape.flatten(), shape.T.flatten())  # (N, 1, s*s)
    shape = shape * (draw[:, 5:] - 0.5).sign().to(x.dtype)[..., None]
    shape = shape + held / (own.pow(1 / norm) + 1e-12)
    length = torch.linalg.vector_norm(shape, ord=norm, dim=2, keepdim=True)
    content = shape * (budget.pow(1 / norm) / (length + 1e-12))
    return _Move(there, taken, below, here, old, image, content)


@cache
def eta(side: int, norm: Length) -> Tensor:
    """Two bumps of opposite sign, one above the other, of length 1 together, (side, side).

    Each falls off from its centre in concentric rectangles, so that shifting budget there moves
    many neurons of a first layer a little.
    """
    upper = side // 2
    # Of length 1 each.
    both = torch.cat((_bump(upper, side, norm), -_bump(side - upper, side, norm)))
    both /= torch.linalg.vector_norm(both, ord=norm)
    return both


def _bump(height: int, width: int, norm: Length) -> Tensor:
    """The sum of 1/k^2 (l2) or 1/k^4 (l1) over the rectangles around the centre with the entry."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns)
    rings = max(height // 2, width // 2) + 1
    weight: Tensor = 1 / torch.arange(1, rings + 1).double() ** (4 if norm == 1 else 2)
    tails = weight.flip(0).cumsum(0).flip(0)
    bump: Tensor = tails[ring]
    bump /= torch.linalg.vector_norm(bump, ord=norm)
    return bump


def _l1_ball(x: Images, radius: Tensor) -> ThreatModel:
    return ThreatModel(norm="l1", epsilon=0).per_example(radius.flatten().expand(len(x)))


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

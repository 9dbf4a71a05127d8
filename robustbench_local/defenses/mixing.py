"""AugMix: chains of simple operations on images, mixed with each other and with the original."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_local.defenses.settings import read_number, require_count
from robustbench_local.types import Images

KEY = "defense.recipe.augmentation.mixing"

LEVELS = 10
"""The scale of `severity`, the authors'."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """The images of AugMix (Hendrycks et al. 2020, arXiv:1912.02781).

    Each image goes through `chains` chains of 1 to `depth` operations, drawn from those of the
    paper: autocontrast, equalize, posterize, solarize, rotate, shear and translate along both axes.
    Each has a level from 0.1 to `severity`, of 10. The chains are mixed with weights from
    Dirichlet(1), their mixture with the image with a weight from Beta(1, 1).

    Deviations from the authors' code: bilinear interpolation where it takes the nearest pixel,
    levels of geometric operations that are not rounded to whole degrees and pixels, and shear about
    the centre of the image, not about its upper left corner.
    """

    chains: int = 3
    depth: int = 3
    severity: float = 3.0

    def __post_init__(self) -> None:
        for name in ("chains", "depth"):
            require_count(f"{KEY}.{name}", getattr(self, name), example=3)
        severity = read_number(
            f"{KEY}.severity",
            self.severity,
            fits=lambda severity: 0.1 <= severity <= LEVELS,
            expected=f"a number from 0.1 to {LEVELS}",
            example=3,
        )
        object.__setattr__(self, "severity", severity)

    @torch.no_grad()
    def __call__(self, x: Images, generator: torch.Generator) -> Images:
        """Mixed images of the same shape, in [0, 1]; `generator` lies on the device of `x`."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=x.device, dtype=x.dtype)

        shares = -(1 - uniform(self.chains, len(x))).log()  # exponential, so normalised Dirichlet
        shares = shares / shares.sum(0)
        mixed = torch.zeros_like(x)
        for share in shares:
            length = torch.randint(self.depth, (len(x),), generator=generator, device=x.device)
            image = x
            for link in range(self.depth):
                which = torch.randint(
                    len(OPERATIONS), (len(x),), generator=generator, device=x.device
                )
                level = (0.1 + (self.severity - 0.1) * uniform(len(x))) / LEVELS
                sign = torch.where(uniform(len(x)) < 0.5, -1, 1)
                image = torch.where(
                    _per_image(link <= length), apply(image, which, level, sign), image
                )
            mixed += _per_image(share) * image
        kept = _per_image(uniform(len(x)))
        return (kept * x + (1 - kept) * mixed).clamp_(0, 1)


def apply(x: Images, which: Tensor, level: Tensor, sign: Tensor) -> Images:
    """Operation number `which` of each image, (N,), at its `level` in [0, 1] and `sign`."""
    changed = x.clone()
    for number, operation in enumerate(OPERATIONS):
        rows = (which == number).nonzero().squeeze(1)
        if len(rows):
            changed[rows] = operation(x[rows], level[rows], sign[rows])
    return changed


def autocontrast(x: Images, level: Tensor, sign: Tensor) -> Images:
    """Every channel stretched to [0, 1]; a constant one stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def equalize(x: Images, level: Tensor, sign: Tensor) -> Images:
    """Every channel with a flat histogram of its 256 values, as Pillow does it."""
    values = _bytes(x).flatten(2)  # (N, C, H*W)
    counts = torch.zeros(*values.shape[:2], 256, device=x.device, dtype=torch.int64)
    counts.scatter_add_(2, values, torch.ones_like(values))
    below = counts.cumsum(2) - counts
    highest = values.amax(2, keepdim=True)
    step = (values.shape[2] - counts.gather(2, highest)) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equal = torch.where(step > 0, table.gather(2, values), values)
    return (equal / 255).view_as(x).to(x.dtype)


def posterize(x: Images, level: Tensor, sign: Tensor) -> Images:
    """4 bits, at level 1 none of them."""
    width = 2.0 ** (4 + (4 * level).floor())  # of a step, in 256ths
    return (_bytes(x) / _per_image(width)).floor() * _per_image(width) / 255


def solarize(x: Images, level: Tensor, sign: Tensor) -> Images:
    """The brightest values inverted, at level 1 all of them."""
    return torch.where(_bytes(x) >= _per_image(256 - (256 * level).floor()), 1 - x, x)


def rotate(x: Images, level: Tensor, sign: Tensor) -> Images:
    """By up to 30 degrees."""
    angle = sign * level * math.radians(30)
    ratio = x.shape[2] / x.shape[3]
    rows = (angle.cos(), -angle.sin() * ratio), (angle.sin() / ratio, angle.cos())
    return _warp(x, rows, (0 * angle, 0 * angle))


def shear_x(x: Images, level: Tensor, sign: Tensor) -> Images:
    """Rows moved sideways, by up to 0.3 of their distance from the middle."""
    one, shear = torch.ones_like(level), sign * level * 0.3 * x.shape[2] / x.shape[3]
    return _warp(x, ((one, shear), (0 * one, one)), (0 * one, 0 * one))


def shear_y(x: Images, level: Tensor, sign: Tensor) -> Images:
    """Columns moved up and down, by up to 0.3 of their distance from the middle."""
    one, shear = torch.ones_like(level), sign * level * 0.3 * x.shape[3] / x.shape[2]
    return _warp(x, ((one, 0 * one), (shear, one)), (0 * one, 0 * one))


def translate_x(x: Images, level: Tensor, sign: Tensor) -> Images:
    """Sideways by up to a third of the width."""
    one = torch.ones_like(level)
    return _warp(x, ((one, 0 * one), (0 * one, one)), (sign * level * 2 / 3, 0 * one))


def translate_y(x: Images, level: Tensor, sign: Tensor) -> Images:
    """Up or down by up to a third of the height."""
    one = torch.ones_like(level)
    return _warp(x, ((one, 0 * one), (0 * one, one)), (0 * one, sign * level * 2 / 3))


OPERATIONS = (
    autocontrast, equalize, posterize, solarize, rotate, shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip

Pair = tuple[Tensor, Tensor]


def _warp(x: Images, rows: tuple[Pair, Pair], shift: Pair) -> Images:
    """Where each pixel is taken from, in coordinates from -1 to 1; black where it is outside."""
    parts = [torch.stack((*row, moved), 1) for row, moved in zip(rows, shift, strict=True)]
    grid = F.affine_grid(torch.stack(parts, 1).to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _bytes(x: Images) -> Tensor:
    return (x * 255).round().to(torch.int64)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)

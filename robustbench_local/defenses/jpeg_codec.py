"""JPEG there and back on whole batches: to the bit, and with a gradient."""

import torch
from torch import Tensor
from torch.nn import functional

from robustbench_local.errors import UserError
from robustbench_local.types import Images

_LUMA = torch.tensor([
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
"""Quantisation steps at quality 50, annex K of the standard (ITU-T T.81); rows are vertical."""

_CHROMA = torch.full((8, 8), 99)
_CHROMA[:4, :4] = torch.tensor(
    [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
)

_HALF_DCT = torch.tensor([
    [8192, 8192, 8192, 8192],
    [11363, 9633, 6437, 2260],
    [10703, 4433, -4433, -10703],
    [9633, -2259, -11362, -6436],
    [8192, -8192, -8192, 8192],
    [6437, -11362, 2261, 9633],
    [4433, -10704, 10704, -4433],
    [2260, -6436, 9633, -11363],
])  # fmt: skip
"""The cosine transform of 8 pixels, times 2^13.5 if orthonormal: what libjpeg's sums of constants
of 13 bits add up to. The other half mirrors this one, with the sign of the row's parity."""

_DCT = torch.cat((_HALF_DCT, _HALF_DCT.flip(1) * torch.tensor([1, -1] * 4)[:, None]), 1).double()

_TO_YCC = torch.tensor(
    [[19595, 38470, 7471], [-11059, -21709, 32768], [32768, -27439, -5329]], dtype=torch.float64
).div(1 << 16)
"""Red, green and blue to luminance and two differences of colour, in 16 bits."""

_TO_RGB = torch.tensor(
    [[0, 91881], [-22554, -46802], [116130, 0]], dtype=torch.float64
).div(1 << 16)  # fmt: skip
"""What the differences of colour add to the luminance."""

_FLOOR = 0.05
"""Least derivative of rounding, see `differentiable`."""


def compress(x: Images, quality: Tensor) -> Images:
    """Images as JPEG files of a quality leave them; shape, device and dtype are kept.

    `quality` is (N,), whole numbers from 1 to 100, or (N, blocks down, blocks across): one for each
    block of 8x8 pixels, those cut off by the border too, which is then taken, in all channels, from
    the file of the whole image at that quality. Pixels are rounded to 8 bits first. One channel
    is a grey file, three are a colour file with colour at half the resolution. Raises `UserError`
    for other numbers of channels.

    These are the integers of libjpeg-turbo with its default settings, the codec of Pillow and most
    programs, without the lossless half that only packs them: bit for bit what Pillow writes and
    reads (tests/defenses/test_jpeg.py), but for a whole batch, and where the images lie. float64
    holds every one of these integers.
    """
    levels = x.detach().clamp(0, 1).mul(255).round().double()
    return _file(levels, quality, exact=True).to(x.dtype).div(255)


def differentiable(x: Images, quality: Tensor) -> Images:
    """A stand-in for `compress` with a useful gradient (after Shin and Song 2017); same arguments.

    Its stages in real numbers, but for the rounding of coefficients: that has the exact value and
    the derivative 3 e^2, e being the distance to the whole number, so that the gradient goes to the
    coefficients that a small change carries over to the next step. That is 0 wherever they all
    vanish, as on black paper: here `floor + (1 - floor) 3 e^2`. Nothing is clipped, which would end
    the gradient at black and white.

    Under PGD on digits at linf 0.3 nothing is left with this nor with the identity; on coloured
    images the identity leaves what this breaks, so this is the default (tests/defenses/test_jpeg.py
    measures both).
    """
    with torch.autocast(x.device.type, enabled=False):
        return _file(x.float() * 255, quality, exact=False).div(255).to(x.dtype)


def _file(levels: Tensor, quality: Tensor, *, exact: bool) -> Tensor:
    """Levels from 0 to 255, shape (N, C, H, W), written and read; `exact` or with a gradient."""
    quality = quality.to(levels.device)
    channels, height, width = levels.shape[1:]
    if quality.ndim > 1 and quality.shape[1:] != (-(-height // 8), -(-width // 8)):
        raise ValueError(
            f"qualities of shape {tuple(quality.shape)} for images of {height}x{width}; expected "
            "one for each image, or for each block of 8x8"
        )
    if channels == 1:
        return _plane(levels, _steps(_LUMA, quality), exact)
    if channels != 3:
        raise UserError(
            f"the images have {channels} channels and a JPEG file holds 1 (grey) or 3 (colour); "
            "type defense=none or choose another defense"
        )
    ycc = torch.einsum("dc,nchw->ndhw", _TO_YCC.to(levels), levels)
    # At an exact half libjpeg rounds luminance up and the differences of colour down.
    luma = _whole(ycc[:, :1], exact)
    chroma = _whole(ycc[:, 1:] + 128, exact, up=0.5 - 2**-16)
    luma, chroma = _plane(luma, _steps(_LUMA, quality), exact), _halved(chroma, exact)
    if quality.ndim == 1:
        colour = _colour(chroma, quality, height, width, exact)
    else:
        # Colour has blocks of 16x16 and is smoothed over their borders: all of it, at each quality.
        pixels = quality.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, :height, :width]
        colour = torch.zeros_like(levels)
        for each in quality.unique():  # type: ignore[no-untyped-call]
            whole = _colour(chroma, each.expand(len(levels)), height, width, exact)
            colour = torch.where(pixels == each, whole, colour)
    return (luma + colour).clamp_(0, 255) if exact else luma + colour


def _colour(chroma: Tensor, quality: Tensor, height: int, width: int, exact: bool) -> Tensor:
    """What halved differences of colour add to the luminance, after writing and reading."""
    chroma = _plane(chroma, _steps(_CHROMA, quality), exact)
    chroma = _doubled(chroma[..., : (height + 1) // 2, : (width + 1) // 2], exact) - 128
    colour = torch.einsum("dc,nchw->ndhw", _TO_RGB.to(chroma), chroma[..., :height, :width])
    return _whole(colour, exact)


def _plane(levels: Tensor, steps: Tensor, exact: bool) -> Tensor:
    """Levels through the cosine transform and quantisation steps, and back.

    Of one channel the steps may differ from block to block: (N, 1 or blocks, 8, 8).
    """
    full = _fill(levels, 8, 8)
    images, channels, height, width = full.shape
    down, across = height // 8, width // 8
    blocks = full.view(images, channels, down, 8, across, 8).transpose(3, 4)
    blocks = blocks.reshape(images, channels * down * across, 8, 8) - 128
    dct, steps = _DCT.to(full), steps.to(full).mT
    # Rows, columns, columns, rows, every product from the right: those are much the faster.
    rows = _whole(_times(blocks, dct.T / 2**11), exact)
    values = _whole(_times(rows.mT, dct.T / 2**15), exact) / (8 * steps)
    if exact:
        values.add_(values.sign(), alpha=0.5).trunc_()
    else:
        values = _round(values)
    columns = _whole(_times(values * steps, dct / 2**11), exact)
    blocks = _whole(_times(columns.mT, dct / 2**18) + 128, exact)
    if exact:
        blocks.clamp_(0, 255)
    blocks = blocks.view(images, channels, down, across, 8, 8).transpose(3, 4)
    return blocks.reshape(full.shape)[..., : levels.shape[2], : levels.shape[3]]


def _times(blocks: Tensor, matrix: Tensor) -> Tensor:
    return (blocks.reshape(-1, 8) @ matrix).view(blocks.shape)


def _steps(table: Tensor, quality: Tensor) -> Tensor:
    """The quantisation steps as libjpeg derives them, shape (N, 1 or blocks, 8, 8)."""
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    percent = (percent[:, None] if percent.ndim == 1 else percent.flatten(1))[..., None, None]
    return ((table.to(quality.device) * percent + 50) // 100).clamp(1, 255)


def _halved(plane: Tensor, exact: bool) -> Tensor:
    """Half the columns and rows: means of four, by turns a quarter rounded down and up."""
    means = functional.avg_pool2d(_fill(plane, 2, 16), 2)
    turns = torch.tensor([0.25, 0.5], device=plane.device).repeat(means.shape[3] // 2)
    return _whole(means, exact, up=turns)


def _doubled(plane: Tensor, exact: bool) -> Tensor:
    """Twice the columns and rows, three quarters of the nearest and one of the next."""
    if plane.shape[3] <= 2:  # too narrow, says libjpeg
        return plane.repeat_interleave(2, 2).repeat_interleave(2, 3)
    doubled = _twice(_twice(plane.mT).mT)
    turns = torch.tensor([8 / 16, 7 / 16], device=plane.device).repeat(plane.shape[3])
    return _whole(doubled, exact, up=turns)


def _twice(plane: Tensor) -> Tensor:
    left = torch.cat((plane[..., :1], plane[..., :-1]), -1)
    right = torch.cat((plane[..., 1:], plane[..., -1:]), -1)
    near = 0.75 * plane
    return torch.stack((near + 0.25 * left, near + 0.25 * right), -1).flatten(-2)


def _fill(plane: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat the last column and the last row until the sides are multiples.

    The gradient of `functional.pad` differs from run to run on a GPU.
    """
    below, right = -plane.shape[2] % rows, -plane.shape[3] % columns
    if right:
        plane = torch.cat((plane, plane[..., -1:].expand(-1, -1, -1, right)), 3)
    if below:
        plane = torch.cat((plane, plane[..., -1:, :].expand(-1, -1, below, -1)), 2)
    return plane


def _whole(values: Tensor, exact: bool, up: float | Tensor = 0.5) -> Tensor:
    return values.add_(up).floor_() if exact else values


def _round(values: Tensor) -> Tensor:
    whole = values.detach().round()
    apart = values - whole
    smooth = _FLOOR * apart + (1 - _FLOOR) * apart**3
    return whole + (smooth - smooth.detach())

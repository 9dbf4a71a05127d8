"""What a transform keeps to, also one that a user wrote."""

import torch
from torch import Tensor

from robustbench_local.errors import UserError
from robustbench_local.threat import TOLERANCE
from robustbench_local.types import Images


def check_images(part: str, out: object, x: Images) -> Images:
    """`out`, what a part made of the images `x`; `UserError` unless these are images again.

    As many, of as many channels, of any size; of the same type on the same device; in [0, 1] but
    for a rounding, and never NaN. Images that were outside themselves may stay there.
    """
    if not isinstance(out, Tensor):
        raise UserError(
            f"{part}.transform returned a {type(out).__name__}; expected a tensor of images"
        )
    if out.dim() != 4 or out.shape[:2] != x.shape[:2] or 0 in out.shape[2:]:
        raise UserError(
            f"{part}.transform returned shape {tuple(out.shape)} for images of shape "
            f"{tuple(x.shape)}; expected ({x.shape[0]}, {x.shape[1]}, height, width)"
        )
    if (out.dtype, out.device) != (x.dtype, x.device):
        raise UserError(
            f"{part}.transform returned {_kind(out)} for images of {_kind(x)}; expected the same: "
            "end with .to(x)"
        )
    if out.numel() and not _in_box(out) and _in_box(x):
        low, high = torch.aminmax(out.detach())
        if low.isnan():
            raise UserError(
                f"{part}.transform returned pixels that are no numbers (NaN) for images in [0, 1]; "
                "expected [0, 1]: look for a division by zero, also by one of its settings"
            )
        raise UserError(
            f"{part}.transform returned pixels from {float(low):g} to {float(high):g} for images "
            "in [0, 1]; expected [0, 1]: end with .clamp(0, 1), and leave normalisation to the "
            "model's first layer"
        )
    return out


def check_surrogate(part: str, stand_in: object, exact: Images) -> Tensor:
    """`stand_in`, what a BPDA surrogate returned; `UserError` unless its gradient can be used."""
    came = (
        f"shape {tuple(stand_in.shape)} of {_kind(stand_in)}"
        if isinstance(stand_in, Tensor)
        else f"a {type(stand_in).__name__}"
    )
    expected = f"shape {tuple(exact.shape)} of {_kind(exact)}"
    if not isinstance(stand_in, Tensor) or came != expected:
        raise UserError(
            f"{part}.surrogate returned {came}; expected what its transform returns, {expected}"
        )
    return check_gradient(f"{part}.surrogate", stand_in)


def check_gradient(what: str, out: Tensor) -> Tensor:
    """`out`, made of images that want a gradient; `UserError` where it has none."""
    if not out.requires_grad:
        raise UserError(
            f"{what} has no gradient and is said to have one; expected a differentiable function "
            "of the images: leave out `differentiable` and `surrogate` for the identity's gradient"
        )
    return out


def _in_box(x: Images) -> bool:
    """Also false where a pixel is NaN."""
    low, high = torch.stack(torch.aminmax(x.detach())).tolist()  # one transfer from a GPU
    return bool(-TOLERANCE <= low <= high <= 1 + TOLERANCE)


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} on {x.device}"

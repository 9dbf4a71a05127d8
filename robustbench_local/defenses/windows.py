"""What transforms share that look at the pixels around a pixel."""

from robustbench_local.errors import UserError
from robustbench_local.types import Images


def clamped(x: Images) -> Images:
    """`x` in [0, 1], with the gradient as it is.

    For averages of pixels, which leave the box by rounding only: behind some kernels a whole white
    area ends up a rounding above 1, where a plain clamp would have no gradient.
    """
    return x + (x.clamp(0, 1) - x).detach()


def require_room(key: str, value: object, x: Images, margin: int) -> None:
    """Raise `UserError` where images are too small to be mirrored `margin` pixels beyond them."""
    smaller = min(x.shape[2:])
    if smaller <= margin:
        raise UserError(
            f"{key}={value} looks {margin} pixels around each pixel and the images have "
            f"{x.shape[2]}x{x.shape[3]}; expected a reach below {smaller}: type a smaller {key}"
        )

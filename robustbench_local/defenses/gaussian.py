"""Gaussian blur."""

from typing import ClassVar

from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.settings import read_number
from robustbench_local.defenses.windows import clamped, require_room
from robustbench_local.types import Images

REACH = 4.0
"""Standard deviations at which the kernel is cut off, as SciPy does."""

_KEY = "defense.wrap.gaussian"


class Gaussian(Preprocess):
    """Blurs with a Gaussian of standard deviation `sigma`, in pixels, each channel for itself.

    The kernel reaches 4 sigma, rounded to a pixel; beyond the border the image is mirrored without
    its edge (SciPy's `mirror`). The gradient is its own: it is linear.
    """

    differentiable: ClassVar[bool] = True

    def __init__(
        self, *, sigma: float = 1.0, in_training: bool = False, at_run_time: bool = True
    ) -> None:
        super().__init__(in_training=in_training, at_run_time=at_run_time)
        self.sigma = read_number(
            f"{_KEY}.sigma", sigma,
            fits=lambda value: value > 0, expected="a number of pixels above 0", example=1.0,
        )  # fmt: skip

    def transform(self, x: Images) -> Images:
        """See the class."""
        from kornia.filters import gaussian_blur2d

        radius = int(REACH * self.sigma + 0.5)
        require_room(f"{_KEY}.sigma", self.sigma, x, radius)
        size = 2 * radius + 1
        return clamped(gaussian_blur2d(x, (size, size), (self.sigma, self.sigma), "reflect"))

"""Median filter."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.defenses.choices import require_one_of
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.types import Images

SIZES = (2, 3, 5)


class Median(Preprocess):
    """Each pixel becomes the median of the window around it, each channel for itself.

    - `size`: of the square window, 2, 3 or 5 pixels. The window of 2 reaches up and left, and the
      median of its four pixels is the larger of the two in the middle: the "2x2 median" of feature
      squeezing (Xu et al. 2018, arXiv:1704.01155), which is `scipy.ndimage.median_filter`'s.

    Beyond the border the image is mirrored with its edge repeated, SciPy's `reflect`.

    The gradient is the median's own, that of the pixel chosen: of 100 CIFAR-10 images an undefended
    network behind size 3 keeps 8 under PGD-20 at linf 4/255, with the identity instead 25 and with
    a mean over the window 16; of 200 of MNIST behind size 2, at linf 0.15, 28, 43 and 29.
    """

    differentiable: ClassVar[bool] = True

    def __init__(
        self, *, size: int = 3, in_training: bool = False, at_run_time: bool = True
    ) -> None:
        super().__init__(in_training=in_training, at_run_time=at_run_time)
        self.size = require_one_of(
            "defense.wrap.median.size", size, SIZES, expected="2, 3 or 5", example=3
        )

    def transform(self, x: Images) -> Images:
        """See the class."""
        return median_filter(x, self.size)


def median_filter(x: Images, size: int) -> Images:
    """The median of every `size` x `size` window, as `Median` defines it."""
    wide = mirrored(mirrored(x, 2, size), 3, size)
    if torch.is_grad_enabled() and x.requires_grad:
        windows = wide.unfold(2, size, 1).unfold(3, size, 1).flatten(4)
        picked: Images = windows.kthvalue(size * size // 2 + 1).values
        return picked
    height, width = x.shape[2:]
    places = [(row, column) for row in range(size) for column in range(size)]
    return _middle([wide[:, :, r : r + height, c : c + width] for r, c in places])


def mirrored(x: Images, dim: int, size: int) -> Images:
    """`x` with room for a window of `size` at every pixel along `dim`, the edge repeated."""
    before, after = size // 2, (size - 1) // 2
    # Slices and not an index: the gradient of indexing differs from run to run on a GPU.
    while before or after:
        length = x.shape[dim]
        left, right = min(before, length), min(after, length)
        parts = (x.narrow(dim, 0, left), x, x.narrow(dim, length - right, right))
        x = torch.cat((parts[0].flip(dim), parts[1], parts[2].flip(dim)), dim)
        before, after = before - left, after - right
    return x


def _middle(values: list[Tensor]) -> Tensor:
    """The elementwise median, of an even number the upper one: a fifth of the time of sorting.

    Of a few values at hand the least cannot be the median once more of them are larger than may be;
    so it is forgotten, the largest likewise, and the next value is taken up.
    """
    smaller = len(values) // 2  # how many of those not yet forgotten are below the median
    larger = len(values) - 1 - smaller
    held: list[Tensor] = []
    for value in values:
        held.append(value)
        while smaller and len(held) - 1 > larger:
            _forget(held, torch.minimum, torch.maximum)
            smaller -= 1
        while larger and len(held) - 1 > smaller:
            _forget(held, torch.maximum, torch.minimum)
            larger -= 1
    return held[0]


def _forget(
    held: list[Tensor],
    extreme: Callable[[Tensor, Tensor], Tensor],
    rest: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Take the extreme out of `held`, at every pixel, by comparing one after the other with it."""
    found = held.pop()
    for place, value in enumerate(held):
        held[place], found = rest(value, found), extreme(value, found)

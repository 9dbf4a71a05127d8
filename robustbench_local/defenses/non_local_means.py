"""Non-local means."""

from typing import ClassVar

import torch
from torch.nn.functional import avg_pool2d, pad

from robustbench_local.defenses.choices import ODD, require_one_of
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.settings import read_number
from robustbench_local.defenses.windows import clamped, require_room
from robustbench_local.types import Images

_KEY = "defense.wrap.nlm"


class NonLocalMeans(Preprocess):
    """Averages over pixels whose surroundings look alike (Buades, Coll and Morel 2005).

    A pixel of the `search` x `search` window weighs exp(-d / strength^2), where d is the mean
    squared difference between the `patch` x `patch` surroundings, all channels together: OpenCV's
    `fastNlMeansDenoising`, to within its rounding to 8 bits. Beyond the border the image is
    mirrored without its edge.

    - `search` and `patch`: odd numbers of pixels from 3.
    - `strength`: in pixel units; `2/255` is read.

    The defaults are those of feature squeezing on CIFAR-10 (13-3-2, Xu et al. 2018,
    arXiv:1704.01155), which however takes OpenCV's variant for colours: it filters lightness and
    hue one by one.

    The gradient is its own, through the weights too: of 100 CIFAR-10 images an undefended network
    keeps 8 under PGD-20 at linf 4/255 with it and 20 with the identity (strength 10/255), and of
    100 of MNIST 10 and 21 at linf 0.3 (strength 0.2). At 2/255 there is no difference.
    """

    differentiable: ClassVar[bool] = True

    def __init__(
        self,
        *,
        search: int = 13,
        patch: int = 3,
        strength: float | str = "2/255",
        in_training: bool = False,
        at_run_time: bool = True,
    ) -> None:
        super().__init__(in_training=in_training, at_run_time=at_run_time)
        odd = "an odd number from 3"
        self.search = require_one_of(f"{_KEY}.search", search, ODD, expected=odd, example=13)
        self.patch = require_one_of(f"{_KEY}.patch", patch, ODD, expected=odd, example=3)
        self.strength = read_number(
            f"{_KEY}.strength", strength,
            fits=lambda value: value > 0, expected="a difference above 0, in pixel units",
            example=0.01,
        )  # fmt: skip

    def transform(self, x: Images) -> Images:
        """See the class."""
        reach = self.search // 2 + self.patch // 2
        require_room(f"{_KEY}.search", self.search, x, reach)
        return non_local_means(x, self.search, self.patch, self.strength)


def non_local_means(x: Images, search: int, patch: int, strength: float) -> Images:
    """See `NonLocalMeans`."""
    around, reach = patch // 2, search // 2 + patch // 2
    wide = pad(x, (reach,) * 4, mode="reflect")
    height, width = x.shape[2] + 2 * around, x.shape[3] + 2 * around
    centre = wide[:, :, reach - around :, reach - around :][:, :, :height, :width]
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for row in range(search):
        for column in range(search):
            moved = wide[:, :, row : row + height, column : column + width]
            unlike = (moved - centre).square().mean(1, keepdim=True)
            weight = (avg_pool2d(unlike, patch, stride=1) / -(strength**2)).exp()
            pixels = moved[:, :, around : height - around, around : width - around]
            total, weights = total + weight * pixels, weights + weight
    return clamped(total / weights)

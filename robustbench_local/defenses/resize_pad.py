"""Random resizing and random padding."""

from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.settings import read_number, require_count
from robustbench_local.defenses.windows import clamped
from robustbench_local.types import Images


class ResizePad(Preprocess):
    """Each image resized by chance and put somewhere on a black canvas (Xie et al. 2018).

    arXiv:1711.01991 resizes 299x299 to a size from 299 to 330 on a canvas of 331.

    - `output`: the side of the canvas as a share of the image's. The paper has 331/299 = 1.107,
      which only networks that take any size stand (those with global pooling). The default of 1
      keeps the size, and images are made smaller instead.
    - `smallest`: the least side of the resized image as a share of the canvas', 299/331 = 0.903 in
      the paper. The sizes from there to one pixel less than the canvas are equally likely, as are
      all places on it. Images of 28 pixels become 25, 26 or 27.
    - `eot_samples`: how many draws an attacker averages.

    Resized bilinearly, with a draw for each image; the authors' code takes the nearest pixel, which
    on small images would drop whole rows, and draws once for the batch. The height is drawn, and
    the width follows it. The gradient is its own: given its draws it is linear.
    """

    randomized = True
    differentiable: ClassVar[bool] = True

    def __init__(
        self,
        *,
        output: float = 1.0,
        smallest: float = 0.903,
        eot_samples: int = 20,
        in_training: bool = False,
        at_run_time: bool = True,
    ) -> None:
        super().__init__(in_training=in_training, at_run_time=at_run_time)
        key = "defense.wrap.resize_pad"
        self.output = read_number(
            f"{key}.output", output,
            fits=lambda value: value > 0, expected="a share of the image above 0", example=1.0,
        )  # fmt: skip
        self.smallest = read_number(
            f"{key}.smallest", smallest,
            fits=lambda value: 0 < value <= 1, expected="a share above 0, 1 at most",
            example=0.903,
        )  # fmt: skip
        require_count(f"{key}.eot_samples", eot_samples, example=20)
        self.eot_samples = eot_samples

    def transform(self, x: Images) -> Images:
        """See the class."""
        height, width = (max(2, round(self.output * side)) for side in x.shape[2:])
        least = max(1, min(round(self.smallest * height), height - 1))
        draws = torch.rand(3, len(x), generator=self.generator(x.device), device=x.device)
        rows = least + (draws[0] * (height - least)).long()
        columns = (rows * width / height).round().long().clamp(1, width - 1)
        down = _places(x.shape[2], height, rows, draws[1]).to(x.dtype)
        across = _places(x.shape[3], width, columns, draws[2]).to(x.dtype)
        return clamped(down[:, None] @ x @ across[:, None].mT)


def _places(pixels: int, canvas: int, sizes: Tensor, draw: Tensor) -> Tensor:
    """What each row of the canvas takes from each row of the image, shape (N, canvas, pixels).

    The image is resized to `sizes` rows, shape (N,), and begins at a row chosen by `draw` in
    [0, 1). Pixels are read at their centres, as `torch.nn.functional.interpolate` does.
    """
    device = sizes.device
    begin = (draw * (canvas - sizes + 1)).long()
    row = torch.arange(canvas, device=device) - begin[:, None]  # (N, canvas), in the resized image
    inside = (row >= 0) & (row < sizes[:, None])
    source = ((row + 0.5) * (pixels / sizes[:, None]) - 0.5).clamp(0, pixels - 1)
    distance = (source[:, :, None] - torch.arange(pixels, device=device)).abs()
    return (1 - distance).clamp_min(0) * inside[:, :, None]

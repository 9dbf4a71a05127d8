"""Two strided convolutions and two linear layers."""

from typing import ClassVar

from torch import nn

from robustbench_local.errors import UserError
from robustbench_local.types import Images, Logits


class SmallCNN(nn.Module):
    """The MNIST network of Wong, Rice and Kolter 2020 (arXiv:2001.03994), wider by default.

    `width` channels after the first convolution, twice as many after the second, each halving the
    image; then `hidden` units. The paper has width 16 and hidden 100. Images need 4x4 pixels.
    """

    channels_last: ClassVar[bool] = True
    """Computes the same in either memory format (no `view`), so the faster one may be taken."""

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        width: int = 32,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        channels, height, columns = input_shape
        require_4x4("SmallCNN", height, columns)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (height // 2 // 2) * (columns // 2 // 2), hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Images) -> Logits:
        """Normalised images (N, C, H, W) to logits (N, K)."""
        logits: Logits = self.layers(x)
        return logits


def require_4x4(name: str, height: int, columns: int) -> None:
    """Raise `UserError` for images that nothing is left of when they are halved twice."""
    if min(height, columns) < 4:
        raise UserError(
            f"model {name} needs images of at least 4x4 pixels and the data has "
            f"{height}x{columns}; type model=mlp"
        )

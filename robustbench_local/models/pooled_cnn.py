"""Two convolutions with pooling and two linear layers."""

from typing import ClassVar

from torch import nn

from robustbench_local.errors import UserError
from robustbench_local.models.small_cnn import require_4x4
from robustbench_local.types import Images, Logits


class PooledCNN(nn.Module):
    """A LeNet-like network (LeCun et al. 1998): it sees more of the image at once than `SmallCNN`.

    `width` channels after the first convolution, twice as many after the second, each `kernel_size`
    wide (odd) and followed by maximum pooling that halves the image; then `hidden` units. Images
    need 4x4 pixels.
    """

    channels_last: ClassVar[bool] = True

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        width: int = 16,
        kernel_size: int = 5,
        hidden: int = 200,
    ) -> None:
        super().__init__()
        channels, height, columns = input_shape
        require_4x4("PooledCNN", height, columns)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"model.kernel_size={kernel_size}; expected an odd number of pixels")
        edge = kernel_size // 2
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size, padding=edge),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel_size, padding=edge),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (height // 2 // 2) * (columns // 2 // 2), hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Images) -> Logits:
        """Normalised images (N, C, H, W) to logits (N, K)."""
        logits: Logits = self.layers(x)
        return logits

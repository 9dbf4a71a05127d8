"""The residual networks for small images of the first residual-network paper."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_local.errors import UserError
from robustbench_local.types import Images, Logits


class ResNet(nn.Module):
    """The CIFAR network of He et al. 2016 (arXiv:1512.03385, section 4.2) with `depth` layers.

    One 3x3 convolution, then three stages of n blocks with two 3x3 convolutions each, halving the
    image and doubling the channels between stages, then global average pooling and one linear
    layer: depth = 6n + 2. Shortcuts have no weights (option A). `width` channels in the first
    stage, 16 in the paper. Takes images of any size and number of channels.
    """

    channels_last: ClassVar[bool] = True

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        depth: int = 20,
        width: int = 16,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise UserError(
                f"model.depth={depth}; expected 6n + 2 layers, type for example model.depth=8, 14, "
                "20, 32, 44, 56 or 110"
            )
        self.stem = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        inner = width
        for outer in (width, 2 * width, 4 * width):
            for _ in range((depth - 2) // 6):
                blocks.append(Block(inner, outer))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inner, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Images) -> Logits:
        """Normalised images (N, C, H, W) to logits (N, K)."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        # A plain mean: the backward pass of adaptive pooling is not deterministic on a GPU.
        logits: Logits = self.head(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation and the identity around them.

    With more channels out than in, the image is halved and the new channels of the identity are 0.
    """

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.stride = 1 if inner == outer else 2
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.more = outer - inner

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (N, inner, H, W) to (N, outer, H/stride, W/stride), rounded up."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(residual + x)

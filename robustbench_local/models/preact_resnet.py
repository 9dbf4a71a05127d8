"""The pre-activation residual network that adversarial training on CIFAR-10 is measured with."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_local.types import Images, Logits


class PreActResNet18(nn.Module):
    """ResNet-18 with full pre-activation (He et al. 2016, arXiv:1603.05027).

    Stem for small images: one 3x3 convolution, no pooling. Global average pooling takes any size
    of at least 1x1 and any number of channels. `width` channels in the first of four stages (64 in
    the paper).
    """

    channels_last: ClassVar[bool] = True

    def __init__(
        self, *, input_shape: tuple[int, int, int], num_classes: int, width: int = 64
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        inner = width
        for stage in range(4):
            outer = width * 2**stage
            blocks.append(PreActBlock(inner, outer, stride=1 if stage == 0 else 2))
            blocks.append(PreActBlock(outer, outer, stride=1))
            inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inner)
        self.head = nn.Linear(inner, num_classes)

    def forward(self, x: Images) -> Logits:
        """Normalised images (N, C, H, W) to logits (N, K)."""
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        # A plain mean: the backward pass of adaptive pooling is not deterministic on a GPU.
        logits: Logits = self.head(x.mean((2, 3)))
        return logits


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, and a shortcut around them."""

    def __init__(self, inner: int, outer: int, *, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        same = stride == 1 and inner == outer
        self.shortcut = None if same else nn.Conv2d(inner, outer, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (N, inner, H, W) to (N, outer, H/stride, W/stride)."""
        active = F.relu(self.norm1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + shortcut

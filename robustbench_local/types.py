"""The nouns every module shares: shapes and ranges, said once."""

from typing import Literal, TypeAlias

from torch import Tensor, nn

Images: TypeAlias = Tensor
"""float32 pixels in [0, 1], shape (N, C, H, W)."""

Labels: TypeAlias = Tensor
"""int64 class indices, shape (N,)."""

Logits: TypeAlias = Tensor
"""float32 class scores, shape (N, K)."""

Model: TypeAlias = nn.Module
"""Maps `Images` to `Logits`; normalisation is its first layer."""

Norm: TypeAlias = Literal["linf", "l2", "l1", "l0", "spatial"]
"""How a perturbation is measured; l0 counts pixels (positions), not channels.

`spatial` is no norm but a set of rotations and translations, see `robustbench_local.spatial`.
"""

Access: TypeAlias = Literal["gradients", "scores", "labels"]
"""What the adversary may read off the victim, the most first."""

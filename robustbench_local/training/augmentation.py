"""Random shifts and mirror images, a whole batch at a time on its own device."""

import torch
import torch.nn.functional as F

from robustbench_local.training.schedule import Augmentation
from robustbench_local.types import Images

PAD = 4


def augment(x: Images, kind: Augmentation, generator: torch.Generator) -> Images:
    """Augmented copies of `x`; `none` returns `x` and draws nothing.

    `crop_flip` pads with `PAD` black pixels, crops back to size at a random place, and mirrors half
    of the images left to right, each image on its own. `generator` lives on the device of `x`.
    """
    if kind == "none":
        return x
    n, _, height, width = x.shape
    device = x.device
    drawn = torch.randint(2 * PAD + 1, (2, n, 1), generator=generator, device=device)
    mirrored = torch.randint(2, (n, 1), generator=generator, device=device).bool()
    across = torch.arange(width, device=device).expand(n, width)
    rows = torch.arange(height, device=device) + drawn[0]  # (N, H)
    columns = torch.where(mirrored, across.flip(1), across) + drawn[1]  # (N, W)
    padded = F.pad(x, (PAD, PAD, PAD, PAD))
    image = torch.arange(n, device=device)[:, None, None]
    # Indexing around the channels moves them to the end: (N, H, W, C).
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

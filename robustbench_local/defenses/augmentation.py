"""Training on noisy, covered and mixed images: robust to accidents, hardly to attacks."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.defenses.mixing import Mixing
from robustbench_local.defenses.recipe import Recipe
from robustbench_local.defenses.settings import read_number, require_kind
from robustbench_local.errors import UserError
from robustbench_local.randomness import derive_seed
from robustbench_local.training.step import Step
from robustbench_local.types import Images, Logits, Model


@dataclass(frozen=True, kw_only=True)
class AugmentedTraining(Recipe):
    """Cross-entropy on augmented images, and the same answer for all of them.

    - `mixing`: AugMix (Hendrycks et al. 2020, arXiv:1912.02781), see `Mixing`; None for none.
    - `cutout`: a square is covered with the batch's mean colour, its side as a share of the shorter
      side of the image, its centre anywhere (DeVries and Taylor 2017, arXiv:1708.04552); 0 for
      none.
    - `noise`: the standard deviation of normal noise, then clipped to [0, 1]; 0 for none.
    - `consistency`: with 0 the loss is cross-entropy on the augmented images; else it is taken on
      the images as they are, plus this weight times the Jensen-Shannon divergence between the
      predictions on them and on two augmentations of each (12 in the paper of AugMix).

    They are applied in this order. Every draw derives from the seed and the step.
    """

    adversarial: ClassVar[bool] = False

    mixing: Mixing | None = None
    cutout: float = 0.0
    noise: float = 0.0
    consistency: float = 0.0

    def __post_init__(self) -> None:
        for name, limit in (("cutout", 1.0), ("noise", 1.0), ("consistency", 1000.0)):
            value = read_number(
                f"defense.recipe.augmentation.{name}",
                getattr(self, name),
                fits=partial(_is_up_to, limit),
                expected=f"a number from 0 to {limit:g}",
                example=0.1,
            )
            object.__setattr__(self, name, value)
        if self.mixing is not None:
            require_kind(
                "defense.recipe.augmentation.mixing",
                self.mixing,
                Mixing,
                expected="the settings of AugMix, or null",
                example="=null",
            )
        if self.mixing is None and self.cutout == self.noise == 0:
            raise UserError(
                "augmentation has mixing=null, cutout=0 and noise=0, which leaves images as they "
                "are; expected one of them: type defense.recipe.augmentation.noise=0.1"
            )

    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`."""
        x, y, criterion = step.x, step.y, step.criterion
        generator = torch.Generator(x.device)
        generator.manual_seed(derive_seed(step.seed, "augmentation", step.number))
        if self.consistency == 0:
            logits: Logits = model(self.augment(x, generator))
            return criterion(logits, y), logits
        views = torch.cat((x, self.augment(x, generator), self.augment(x, generator)))
        clean, first, second = model(views).chunk(3)
        apart = jensen_shannon(clean, first, second)
        return criterion(clean, y) + self.consistency * apart, clean

    @torch.no_grad()
    def augment(self, x: Images, generator: torch.Generator) -> Images:
        """One augmentation of each image, same shape, in [0, 1]."""
        if self.mixing is not None:
            x = self.mixing(x, generator)
        if self.cutout > 0:
            x = cover(x, self.cutout, generator)
        if self.noise > 0:
            drawn = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = (x + self.noise * drawn).clamp_(0, 1)
        return x


def _is_up_to(limit: float, number: float) -> bool:
    return 0 <= number <= limit


def cover(x: Images, share: float, generator: torch.Generator) -> Images:
    """A square of each image in the mean colour of the batch; a part of it may lie outside."""
    n, _, height, width = x.shape
    side = max(1, round(share * min(height, width)))
    top, left = (
        torch.randint(size, (n, 1), generator=generator, device=x.device) - side // 2
        for size in (height, width)
    )
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = (row >= top) & (row < top + side)  # (N, H)
    columns = (column >= left) & (column < left + side)
    covered = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(covered, x.mean((0, 2, 3), keepdim=True), x)


def jensen_shannon(*logits: Logits) -> Tensor:
    """Mean divergence of the predictions, each (N, K), from their mean; a scalar."""
    predicted = torch.stack([one.log_softmax(1) for one in logits])
    middle = predicted.logsumexp(0) - math.log(len(logits))
    return (predicted.exp() * (predicted - middle)).sum(2).mean()

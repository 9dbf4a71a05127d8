"""Gradient steps with momentum, made to carry over from one model to another."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.errors import UserError
from robustbench_local.gradients import Loss, input_gradient, require_classes
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Logits, Model, Norm

if TYPE_CHECKING:
    from robustbench_local.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Momentum(Attack):
    """Iterated steps along an average of gradients, MI-FGSM (Dong et al. 2018, arXiv:1710.06081).

    - `steps`, and `step_size` as a fraction of epsilon; the paper has 1 / steps.
    - `decay` of the sum of gradients, each scaled to a mean absolute value of 1; 0 for none, which
      is iterated FGSM, and FGSM itself with `steps=1, step_size=1`.
    - `diversity_probability`: how often the model sees the image shrunk to a random size, of
      `diversity_scale` at least, and padded with black at random (DI, Xie et al. 2019,
      arXiv:1803.06978); 0 for never.
    - `kernel_size`: the gradient is smoothed by a Gaussian of so many pixels, three standard
      deviations to either side (TI, Dong et al. 2019, arXiv:1904.02884); odd, 1 for none.
    - `samples`: gradients averaged at each step, over copies of the image under normal noise of
      deviation `noise`, pixel units (Wu et al. 2018, arXiv:1802.09707); 1 and 0 for none. Such
      copies may leave [0, 1].
    - `loss`: see `attack_loss`. `target`: the class to reach, see `attacks.target`.

    The last iterate is returned, and nothing stops early: a point just across the boundary of one
    model is seldom across that of another. On the model itself `PGD` is the stronger attack.

    Deviations: DI enlarges images in its paper, here they are shrunk (bilinearly), since not every
    network takes another size; each image draws its own size and place. l2 steps are those of
    `ThreatModel.direction`.
    """

    needs: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2"})
    per_example_radius: ClassVar[bool] = True

    steps: int = 10
    step_size: float = 0.1
    decay: float = 1.0
    diversity_probability: float = 0.0
    diversity_scale: float = 0.9
    kernel_size: int = 1
    samples: int = 1
    noise: float = 0.0
    loss: Loss = "ce"
    target: Target = None

    def __post_init__(self) -> None:
        check_target(self.target)
        for name in ("steps", "kernel_size", "samples"):
            require_count(name, getattr(self, name))
        for name, fine, expected in (
            ("loss", self.loss in get_args(Loss), f"one of {', '.join(get_args(Loss))}"),
            ("step_size", self.step_size > 0, "a fraction of epsilon above 0"),
            ("decay", 0 <= self.decay < float("inf"), "0 (no momentum) or a number above it"),
            ("noise", 0 <= self.noise < float("inf"), "a deviation of 0 or above in pixel units"),
            ("diversity_probability", 0 <= self.diversity_probability <= 1, "a number in [0, 1]"),
            ("diversity_scale", 0 < self.diversity_scale <= 1, "a share above 0 and up to 1"),
            ("kernel_size", self.kernel_size % 2 == 1, "an odd number of pixels, 1 for none"),
        ):
            if not fine:
                raise UserError(f"attack.{name}={getattr(self, name)}; expected {expected}")
        if self.samples > 1 and self.noise == 0:
            raise UserError(
                f"attack.samples={self.samples} would average equal gradients without noise; type "
                "attack.noise=0.1 or attack.samples=1"
            )

    def check(self, data: "Dataset", threat: ThreatModel) -> None:
        """Raise `UserError` also for a loss that so few classes do not have."""
        super().check(data, threat)
        require_classes(self.loss, data.num_classes)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """All steps, from the image itself."""
        y, targeted = self.goal(model, x, y)
        draws = Draws(x, derive_seed(self.seed, "momentum"))
        stride = threat.radius(x, self.step_size)
        x_adv, velocity = x, torch.zeros_like(x)
        for _ in range(self.steps):
            gradient = torch.zeros_like(x)
            for _ in range(self.samples):
                gradient += self._look(model, x_adv, y, targeted, draws)
            gradient = smooth(gradient, self.kernel_size)
            scale = gradient.abs().mean((1, 2, 3), keepdim=True)
            velocity = self.decay * velocity + gradient / scale.clamp(min=1e-38)
            x_adv = threat.project(x_adv + stride * threat.direction(velocity, x_adv, stride), x)
        return x_adv

    def _look(self, model: Model, x: Images, y: Labels, targeted: bool, draws: Draws) -> Tensor:
        """The gradient at the images, under a new draw of what was asked for."""
        seen = self._diverse(model, x, draws) if self.diversity_probability > 0 else model
        if self.noise > 0:
            x = x + self.noise * draws.normal(x[0].numel()).view_as(x).to(x.dtype)
        return input_gradient(seen, x, y, loss=self.loss, targeted=targeted).gradient

    def _diverse(self, model: Model, x: Images, draws: Draws) -> nn.Module:
        """The model behind a new draw of sizes and places, one for each image."""
        chance, share, top, left = draws.uniform(4).double().unbind(1)
        share = torch.where(chance < self.diversity_probability, share, 1.0)
        rows = _resampling(x.shape[2], self.diversity_scale, share, top)
        columns = _resampling(x.shape[3], self.diversity_scale, share, left)
        return _Resized(model, rows.to(x), columns.to(x))


class _Resized(nn.Module):
    """A model that sees every image of a batch through linear maps of rows and columns."""

    whole_batches = True  # a map for each image

    def __init__(self, model: Model, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.model = model
        self.rows = rows  # (N, 1, H, H)
        self.columns = columns  # (N, 1, W, W)

    def forward(self, x: Images) -> Logits:
        """Each image resized and padded on its own."""
        logits: Logits = self.model(self.rows @ x @ self.columns.mT)
        return logits


def _resampling(length: int, smallest: float, share: Tensor, place: Tensor) -> Tensor:
    """Maps that shrink a line of `length` pixels and pad it with 0: (N, 1, length, length).

    `share` and `place`, float64 (N,) up to 1, choose the size among those from `smallest * length`
    to `length`, and where the line begins. A share of 1 keeps the line as it is.
    """
    least = max(
        1, int(smallest * length + 1e-9)
    )  # rounded down, or small images would never shrink
    size = (least + (share * (length - least + 1)).long()).clamp_(max=length)
    start = (place * (length - size + 1)).long()
    position = torch.arange(length, device=share.device)
    inside = position - start[:, None]  # (N, length), of every pixel in the shrunk line
    source = (inside + 0.5) * (length / size.double())[:, None] - 0.5
    source = source.clamp(0, length - 1)
    weight = (1 - (source[:, :, None] - position).abs()).clamp_(min=0)
    weight *= ((inside >= 0) & (inside < size[:, None]))[:, :, None]
    return weight[:, None]


def smooth(gradient: Tensor, size: int) -> Tensor:
    """The gradient under a Gaussian of `size` pixels, each channel alone; 0 beyond its edge."""
    if size == 1:
        return gradient
    line = torch.linspace(-3, 3, size, device=gradient.device, dtype=torch.float64)
    line = torch.exp(-line.square() / 2)
    line = (line / line.sum()).to(gradient.dtype)
    # Channels become images of their own: one kernel serves any number of them.
    flat = gradient.reshape(-1, 1, *gradient.shape[2:])
    flat = functional.conv2d(flat, line.view(1, 1, -1, 1), padding=(size // 2, 0))
    flat = functional.conv2d(flat, line.view(1, 1, 1, -1), padding=(0, size // 2))
    return flat.view_as(gradient)

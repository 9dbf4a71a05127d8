"""Adversarial training whose perturbations cost no gradient of their own."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from robustbench_local.defenses.adversarial_training import AdversarialRecipe
from robustbench_local.defenses.settings import read_number, require_count
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels, Model, Norm

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")


class Carried:
    """The perturbation that a step hands on to the next one, shape (N, C, H, W)."""

    delta: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FreeAdversarialTraining(AdversarialRecipe):
    """Free adversarial training (Shafahi et al. 2019, arXiv:1904.12843).

    Every minibatch is trained on `replays` times in a row (m in the paper). One backward pass gives
    the gradient of the weights and of the images; the next step starts from the perturbation that
    the latter moved, also on another minibatch. `step_size` as a fraction of epsilon. An epoch has
    as many gradient steps as without, so it sees `replays` times fewer images.

    Deviations from the paper: the ramp of epsilon; perturbations start at 0 in every epoch, so that
    a training can go on after any; and what is carried over has been brought into [0, 1] with the
    image it was found on.
    """

    key: ClassVar[str] = "defense.recipe.free"

    replays: int = 4
    step_size: float = 1.0
    carried: Carried = field(default_factory=Carried, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(f"{self.key}.replays", self.replays, example=4)
        size = read_number(
            f"{self.key}.step_size",
            self.step_size,
            fits=lambda size: size > 0,
            expected="a fraction of epsilon above 0",
            example=1,
        )
        object.__setattr__(self, "step_size", size)
        if self.threat.norm not in NORMS:
            raise UserError(
                f"{self.key} does not serve train.threat.norm={self.threat.norm}; expected one of "
                f"{', '.join(NORMS)}: type train.threat.norm=linf"
            )

    def begin(self) -> Self:
        """See `Recipe.begin`: nothing is carried over from another epoch."""
        return replace(self)

    def craft(self, model: Model, x: Images, y: Labels, threat: ThreatModel, seed: int) -> Images:
        """The images at the perturbation held; it moves when the loss on them goes backward."""
        if threat.epsilon == 0:
            return x
        delta = self.carried.delta
        start = x if delta is None or delta.shape != x.shape else threat.project(x + delta, x)
        x_adv = start.detach().clone().requires_grad_()
        move = partial(self._move, x_adv.detach(), x, threat)
        x_adv.register_hook(move)  # type: ignore[no-untyped-call]
        return x_adv

    def _move(self, x_adv: Images, x: Images, threat: ThreatModel, gradient: Tensor) -> None:
        # A loss scaled for float16 may overflow; its sign still points the right way.
        gradient = gradient.to(x.dtype).nan_to_num()
        with torch.no_grad():
            stride = threat.radius(x, self.step_size)
            move = threat.direction(gradient, x_adv, stride, progress=0.0)
            self.carried.delta = threat.project(x_adv + stride * move, x) - x

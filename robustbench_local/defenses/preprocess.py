"""The base of run-time transforms: exact forward, a gradient the attacker can use backward."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from robustbench_local.defenses.contract import check_gradient, check_images, check_surrogate
from robustbench_local.defenses.settings import require_flag
from robustbench_local.types import Images

if TYPE_CHECKING:
    from robustbench_local.training.workshop import Workshop


RUN_TIME: frozenset[str] = frozenset({"at_run_time", "eot_samples"})
"""Settings that every part of a defense may have and that decide no weights."""


class Seeded(nn.Module):
    """A module that takes its random draws from a generator of its own, never a global one."""

    def __init__(self) -> None:
        super().__init__()
        self._seed = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device | str) -> torch.Generator:
        """This module's own generator on a device, where `reseed` put it and draws moved it."""
        device = torch.device(device)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def reseed(self, seed: int) -> None:
        """Start the random draws anew from `seed`."""
        self._seed = seed
        self._generators.clear()


class Preprocess(Seeded, ABC):
    """A transform of the pixels in front of a model, images in [0, 1] to images of any size.

    Subclasses implement `transform`, the exact transform, which may be random and need not be
    differentiable. Backward passes take the gradient of `surrogate` in its place (BPDA, Athalye et
    al. 2018, arXiv:1802.00420): the identity unless a better stand-in is given. A transform that
    has a useful gradient of its own says `differentiable = True` and needs no surrogate.

    One that draws random numbers says `randomized = True` and takes them from `generator`, never
    from torch's global one; `eot_samples` is how many draws an attacker who knows it averages.

    With `in_training` recipes train the network behind the transform; without `at_run_time` it is
    left out of the victim. `run_time_only` names the settings that decide no weights. Raises
    `UserError` for flags that are neither true nor false.
    """

    randomized: bool = False
    differentiable: ClassVar[bool] = False
    eot_samples: int = 20
    run_time_only: ClassVar[frozenset[str]] = RUN_TIME

    def __init__(self, *, in_training: bool = False, at_run_time: bool = True) -> None:
        super().__init__()
        require_flag("defense.wrap.NAME.in_training", in_training)
        require_flag("defense.wrap.NAME.at_run_time", at_run_time)
        self.in_training = in_training
        self.at_run_time = at_run_time

    @abstractmethod
    def transform(self, x: Images) -> Images:
        """The exact transform, what the deployed pipeline computes."""

    def surrogate(self, x: Images) -> Images:
        """A differentiable stand-in, same shape as `transform`'s; only its gradient counts."""
        return x

    def fit(self, workshop: "Workshop") -> Self:
        """Train what the transform itself has to learn, for `workshop.network`. Here nothing."""
        return self

    def forward(self, x: Images) -> Images:
        """The value of `transform`, with the gradient of `surrogate`, in full precision.

        Raises `UserError` for what is no batch of images, and for a gradient that is not there.
        """
        part, tracked = type(self).__name__, torch.is_grad_enabled() and x.requires_grad
        with torch.autocast(x.device.type, enabled=False):
            if self.differentiable or not tracked:
                out = check_images(part, self.transform(x), x)
                return check_gradient(f"{part}.transform", out) if tracked else out
            with torch.no_grad():
                exact = check_images(part, self.transform(x), x)
            stand_in = check_surrogate(part, self.surrogate(x), exact)
        straight: Images = _Straight.apply(exact, stand_in)
        return straight


class _Straight(torch.autograd.Function):
    """The first argument forward, the gradient to the second backward.

    Not `stand_in + (exact - stand_in).detach()`, which rounds.
    """

    @staticmethod
    def forward(ctx: Any, exact: Tensor, stand_in: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]

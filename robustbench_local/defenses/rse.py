"""Random noise in front of every convolution, in training and at run time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustbench_local.defenses.averaged import Averaged, looks
from robustbench_local.defenses.layers import RandomLayers, own_parts
from robustbench_local.defenses.preprocess import RUN_TIME
from robustbench_local.defenses.settings import read_number, require_count, require_flag
from robustbench_local.errors import UserError
from robustbench_local.models.normalize import Normalize
from robustbench_local.types import Model

_KEY = "defense.wrap.rse"


class NoisyLayers(RandomLayers):
    """A model with normal noise on the input of its convolutions, or of its linear layers.

    Normalisation counts as the first of them where the model has it, so that its noise is in pixel
    units; the layer after it then gets none.
    """

    def __init__(self, model: Model, *, init: float, inner: float, eot_samples: int) -> None:
        super().__init__(model, eot_samples=eot_samples)
        if not self.layers():
            raise UserError(
                "defense rse adds noise to the input of convolutions or linear layers and the "
                "model has none (torch.nn.Conv2d, torch.nn.Linear); choose another model or "
                "defense=noise_fusion"
            )
        entrance = isinstance(self.layers()[0], Normalize)
        self._first = [init, 0.0] if entrance else [init]
        self._inner = inner

    def layers(self) -> Sequence[nn.Module]:
        """See `RandomLayers.layers`."""
        return _noisy_layers(self.model)

    def change(self, entering: Tensor, place: int) -> Tensor:
        """See `RandomLayers.change`."""
        deviation = self._first[place] if place < len(self._first) else self._inner
        if deviation == 0:
            return entering
        noise = torch.empty_like(entering)
        _in_memory_order(noise).normal_(0, deviation, generator=self.generator(noise.device))
        return noise.add_(entering)


def _in_memory_order(values: Tensor) -> Tensor:
    """The same numbers as they lie in memory: a CPU draws into others at a sixth of the speed."""
    if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1)
    return values


def _noisy_layers(model: Model) -> list[nn.Module]:
    """Its normalisation, if any, then its convolutions or, without any, its linear layers."""
    parts = list(own_parts(model))
    layers: list[nn.Module] = [part for part in parts if isinstance(part, nn.Conv2d)]
    layers = layers or [part for part in parts if isinstance(part, nn.Linear)]
    entrances = [part for part in parts if isinstance(part, Normalize)]
    return [*entrances[:1], *layers] if layers else []


@dataclass(frozen=True, kw_only=True)
class RSE:
    """Random self-ensemble (Liu et al. 2018, arXiv:1712.00673).

    - `init`: standard deviation of the noise on the image, in pixel units; `inner`: of that on the
      input of every further convolution, in the units that come in there. 0 for none; not both.
      Networks without convolutions get it on the input of their linear layers.
    - `ensembles`: passes at run time whose probabilities are averaged, see `Averaged`; training
      sees one.
    - `in_training`, `at_run_time`: the method is both.
    - `eot_samples`: passes that an attacker averages for one gradient; see `NoiseFusion`.

    Deviations: the first noise goes in front of the normalisation where the network has one, since
    the networks of the paper take pixels; 10 ensembles for their cost, the authors' code has 50.
    Raises `UserError` for values out of range and for a model without such layers.
    """

    run_time_only: ClassVar[frozenset[str]] = RUN_TIME | {"ensembles"}
    averages: ClassVar[bool] = True

    init: float = 0.2
    inner: float = 0.1
    ensembles: int = 10
    in_training: bool = True
    at_run_time: bool = True
    eot_samples: int = 20

    def __post_init__(self) -> None:
        for name, example in (("init", 0.2), ("inner", 0.1)):
            deviation = read_number(
                f"{_KEY}.{name}",
                getattr(self, name),
                fits=lambda number: number >= 0,
                expected="a standard deviation, 0 or more",
                example=example,
            )
            object.__setattr__(self, name, deviation)
        if self.init == self.inner == 0:
            raise UserError(
                f"{_KEY}.init=0 and {_KEY}.inner=0 leave no noise; expected one above 0: type "
                f"{_KEY}.init=0.2"
            )
        require_count(f"{_KEY}.ensembles", self.ensembles, example=10)
        require_count(f"{_KEY}.eot_samples", self.eot_samples, example=20)
        for name in ("in_training", "at_run_time"):
            require_flag(f"{_KEY}.{name}", getattr(self, name))

    def __call__(self, model: Model) -> Model:
        """What is deployed: the mean over the ensembles."""
        return Averaged(self.through(model), draws=self.ensembles)

    def through(self, model: Model) -> Model:
        """What is trained: the model with one draw of noise."""
        samples = looks(self.eot_samples, self.ensembles)
        return NoisyLayers(model, init=self.init, inner=self.inner, eot_samples=samples)

"""Random noise on the pixels, in training and at run time."""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from robustbench_local.defenses.averaged import Averaged, looks
from robustbench_local.defenses.defense import Wrapped
from robustbench_local.defenses.preprocess import RUN_TIME, Preprocess
from robustbench_local.defenses.settings import read_number, require_count, require_flag
from robustbench_local.errors import UserError
from robustbench_local.types import Images, Model

Distribution: TypeAlias = Literal["uniform", "gaussian", "laplace", "bernoulli"]
"""At amplitude 1: uniform in [-1, 1], standard normal, Laplace of variance 1, -1 or 1."""

_KEY = "defense.wrap.noise_fusion"


class Noise(Preprocess):
    """clip(x + amplitude * n, 0, 1) with fresh n for every pixel, image and pass.

    Its gradient is the exact one of the pass that was drawn: 1, and 0 where the pixel was clipped.
    """

    randomized = True
    differentiable = True

    def __init__(self, *, distribution: Distribution, amplitude: float, eot_samples: int) -> None:
        super().__init__()
        self.distribution = distribution
        self.amplitude = amplitude
        self.eot_samples = eot_samples

    def transform(self, x: Images) -> Images:
        """Images in [0, 1] of the same shape."""
        noise = draw_noise(self.distribution, x, self.generator(x.device))
        return noise.mul_(self.amplitude).add(x).clamp(0, 1)


def draw_noise(distribution: Distribution, like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent values of the shape, type and device of `like`, at amplitude 1."""
    values = torch.empty_like(like)
    if distribution == "gaussian":
        return values.normal_(generator=generator)
    if distribution == "uniform":
        return values.uniform_(-1, 1, generator=generator)
    if distribution == "bernoulli":
        return values.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    # The difference of two exponential variables of rate sqrt(2) is Laplace of variance 1.
    rate = 2**0.5
    other = torch.empty_like(like).exponential_(rate, generator=generator)
    return values.exponential_(rate, generator=generator).sub_(other)


@dataclass(frozen=True, kw_only=True)
class NoiseFusion:
    """Noise-fusion method, NFM (Shi, Liao, He 2022, Electronics 11(12):1814).

    An abstract-level reproduction: paper and code could not be read beyond the abstract, which says
    that noise of various distributions and amplitudes goes on the training images and on the input
    at run time. The rest is our own definition, x' = clip(x + amplitude * n, 0, 1).

    - `distribution` of n, see `Distribution`; `amplitude` in pixel units, above 0, also "8/255".
    - `in_training`, `at_run_time`: where the noise is added; both is the method, one alone an
      ablation. Training sees one draw of every image each time it comes up.
    - `draws`: noisy passes at run time whose probabilities are averaged, see `Averaged`.
    - `eot_samples`: noisy passes that an attacker averages for one gradient. Those that the victim
      averages by itself count, but never fewer than two looks are taken.

    Raises `UserError` for values out of range.
    """

    run_time_only: ClassVar[frozenset[str]] = RUN_TIME | {"draws"}
    averages: ClassVar[bool] = True

    distribution: Distribution = "gaussian"
    amplitude: float = 0.3
    draws: int = 10
    in_training: bool = True
    at_run_time: bool = True
    eot_samples: int = 20

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            raise UserError(
                f"{_KEY}.distribution={self.distribution}; expected one of "
                f"{', '.join(get_args(Distribution))}: type {_KEY}.distribution=gaussian"
            )
        amplitude = read_number(
            f"{_KEY}.amplitude",
            self.amplitude,
            fits=lambda number: number > 0,
            expected="a number above 0 in pixel units",
            example=0.1,
        )
        object.__setattr__(self, "amplitude", amplitude)
        require_count(f"{_KEY}.draws", self.draws, example=10)
        require_count(f"{_KEY}.eot_samples", self.eot_samples, example=20)
        for name in ("in_training", "at_run_time"):
            require_flag(f"{_KEY}.{name}", getattr(self, name))

    def __call__(self, model: Model) -> Model:
        """What is deployed: the mean over the draws."""
        return Averaged(self.through(model), draws=self.draws)

    def through(self, model: Model) -> Model:
        """What is trained: the model behind one draw."""
        noise = Noise(
            distribution=self.distribution,
            amplitude=self.amplitude,
            eot_samples=looks(self.eot_samples, self.draws),
        )
        return Wrapped(noise, model)

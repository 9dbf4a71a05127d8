"""Normal noise on the pixels, the class that wins under it, and the radius that this proves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from robustbench_local.defenses.averaged import Averaged, looks
from robustbench_local.defenses.certificate import Majority, certified_accuracy
from robustbench_local.defenses.preprocess import RUN_TIME, Seeded
from robustbench_local.defenses.settings import read_number, require_count, require_flag
from robustbench_local.errors import UserError
from robustbench_local.types import Images, Logits, Model

if TYPE_CHECKING:
    from robustbench_local.data import Split

_KEY = "defense.wrap.randomized_smoothing"


class NoisyInput(Seeded):
    """A model under normal noise of standard deviation `sigma` on every pixel, never clipped.

    The model meets pixels outside [0, 1], as in training: the certificate needs the whole noise.
    """

    randomized = True

    def __init__(self, model: Model, *, sigma: float, eot_samples: int) -> None:
        super().__init__()
        self.model = model
        self.sigma = sigma
        self.eot_samples = eot_samples

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K); each image has its own noise."""
        noise = torch.empty_like(x).normal_(0, self.sigma, generator=self.generator(x.device))
        logits: Logits = self.model(x + noise)
        return logits


@dataclass(frozen=True, kw_only=True)
class RandomizedSmoothing:
    """Randomized smoothing (Cohen, Rosenfeld and Kolter 2019, arXiv:1902.02918), proved under l2.

    - `sigma`: standard deviation of the noise in pixel units, in training and at run time.
    - `draws`: passes whose probabilities the victim that is attacked and judged averages: the soft
      smoothed classifier, which SmoothAdv attacks (Salman et al. 2019, arXiv:1906.04584). The
      certificate is about the class with the most votes, see `Majority`.
    - `n0`, `n`, `alpha`: votes that choose a class, votes that certify it, and the probability that
      a certificate is wrong; `radii` in pixel units, at which certified accuracy is reported, on
      `images` test images (None: all).
    - `in_training`, `at_run_time`: without the first the network has never met noise.
    - `eot_samples`: passes that an attacker averages for one gradient; see `NoiseFusion`.

    It has to be the first wrap: what lies in front of it would change the image that the
    certificate is about. Raises `UserError` for values out of range.
    """

    run_time_only: ClassVar[frozenset[str]] = RUN_TIME | {
        "draws", "n0", "n", "alpha", "radii", "images",
    }  # fmt: skip
    averages: ClassVar[bool] = True

    sigma: float = 0.25
    draws: int = 20
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    radii: Sequence[float] = (0.0, 0.25, 0.5, 0.75)
    images: int | None = 200
    in_training: bool = True
    at_run_time: bool = True
    eot_samples: int = 20

    def __post_init__(self) -> None:
        sigma = read_number(
            f"{_KEY}.sigma",
            self.sigma,
            fits=lambda number: number > 0,
            expected="a standard deviation above 0 in pixel units",
            example=0.25,
        )
        alpha = read_number(
            f"{_KEY}.alpha",
            self.alpha,
            fits=lambda number: 0 < number < 0.5,
            expected="the probability of a wrong certificate, above 0 and below 0.5",
            example=0.001,
        )
        object.__setattr__(self, "sigma", sigma)
        object.__setattr__(self, "alpha", alpha)
        examples = {"draws": 20, "n0": 100, "n": 10_000, "images": 200, "eot_samples": 20}
        for name, example in examples.items():
            if name != "images" or self.images is not None:
                require_count(f"{_KEY}.{name}", getattr(self, name), example=example)
        object.__setattr__(self, "radii", self._read_radii())
        for name in ("in_training", "at_run_time"):
            require_flag(f"{_KEY}.{name}", getattr(self, name))

    def _read_radii(self) -> tuple[float, ...]:
        listed = isinstance(self.radii, Sequence) and not isinstance(self.radii, str)
        if not listed or not self.radii:
            raise UserError(
                f"{_KEY}.radii={self.radii}; expected a list of radii in pixel units: type "
                f"{_KEY}.radii=[0,0.25,0.5]"
            )
        radii = {
            read_number(
                f"{_KEY}.radii entry",
                radius,
                fits=lambda number: number >= 0,
                expected="an l2 radius in pixel units, 0 or more",
                example=0.25,
            )
            for radius in self.radii
        }
        return tuple(sorted(radii))

    def __call__(self, model: Model) -> Model:
        """What is deployed: the mean over the draws."""
        return Averaged(self.through(model), draws=self.draws)

    def through(self, model: Model) -> Model:
        """What is trained: the model under one draw."""
        samples = looks(self.eot_samples, self.draws)
        return NoisyInput(model, sigma=self.sigma, eot_samples=samples)

    def majority(self, victim: Model) -> Majority:
        """The classifier that certificates are about, of a victim that this has built."""
        if not (isinstance(victim, Averaged) and isinstance(victim.model, NoisyInput)):
            raise UserError(
                f"a {type(victim).__name__} cannot be certified; expected a model inside defense "
                "randomized_smoothing, its first wrap: type for example "
                "defense=[randomized_smoothing,jpeg]"
            )
        return Majority(
            noisy=victim.model, sigma=self.sigma, n0=self.n0, n=self.n, alpha=self.alpha
        )

    def certify(
        self,
        victim: Model,
        split: "Split",
        *,
        seed: int = 0,
        progress: Callable[[int, float], None] = lambda done, certified: None,
    ) -> dict[str, Any]:
        """Certified accuracy of the victim at the `radii`; see `certified_accuracy`."""
        return certified_accuracy(
            self.majority(victim),
            split,
            self.radii,
            images=self.images,
            seed=seed,
            progress=progress,
        )

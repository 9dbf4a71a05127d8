"""Adversarial training at the price of one gradient step per image."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from robustbench_local.attacks import PGD
from robustbench_local.defenses.adversarial_training import AdversarialRecipe
from robustbench_local.defenses.settings import read_number
from robustbench_local.errors import UserError
from robustbench_local.gradients import input_gradient, pristine
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels, Model

Start = Literal["uniform", "noise"]

STEP_SIZE: dict[Start, float] = {"uniform": 1.25, "noise": 1.0}
"""What the papers take, as a fraction of epsilon."""


@dataclass(frozen=True, kw_only=True)
class FastAdversarialTraining(AdversarialRecipe):
    """One FGSM step from a random start.

    - `start="uniform"` (FGSM-RS; Wong, Rice and Kolter 2020, arXiv:2001.03994): a uniform point of
      the ball, one step, back into the ball.
    - `start="noise"` (N-FGSM; de Jorge et al. 2022, arXiv:2202.01181): uniform noise of `noise`
      times epsilon in every pixel, one step, and nothing is brought back into the ball: only [0, 1]
      holds. For linf.
    - `step_size` as a fraction of epsilon; None for that of the paper, 1.25 and 1.

    Both can collapse (catastrophic overfitting): the network becomes robust to its own training
    attack only. Every epoch is measured under the `validation` attack, the best one is kept, and a
    collapse is told among the warnings; `train.patience` ends the training after it.

    Deviations from the papers: the ramp of epsilon, and images crafted with the network in eval
    mode.
    """

    key: ClassVar[str] = "defense.recipe.fast_adversarial_training"

    start: Start = "uniform"
    step_size: float | None = None
    noise: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in get_args(Start):
            raise UserError(
                f"{self.key}.start={self.start}; expected {' or '.join(STEP_SIZE)}: type "
                f"{self.key}.start=uniform"
            )
        if self.step_size is not None:
            size = read_number(
                f"{self.key}.step_size",
                self.step_size,
                fits=lambda size: size > 0,
                expected="a fraction of epsilon above 0, or null for that of the paper",
                example=1.25,
            )
            object.__setattr__(self, "step_size", size)
        noise = read_number(
            f"{self.key}.noise",
            self.noise,
            fits=lambda multiple: multiple >= 0,
            expected="a multiple of epsilon, 0 or more",
            example=2,
        )
        object.__setattr__(self, "noise", noise)
        if self.start == "noise" and self.threat.norm != "linf":
            raise UserError(
                f"{self.key}.start=noise is defined for linf and train.threat.norm="
                f"{self.threat.norm}; type {self.key}.start=uniform"
            )
        self._fgsm(0).require(self.threat)

    @property
    def _stride(self) -> float:
        return STEP_SIZE[self.start] if self.step_size is None else self.step_size

    def _fgsm(self, seed: int) -> PGD:
        return PGD(steps=1, step_size=self._stride, early_stop=False, best_iterate=False, seed=seed)

    def craft(self, model: Model, x: Images, y: Labels, threat: ThreatModel, seed: int) -> Images:
        """See `AdversarialRecipe.craft`."""
        if self.start == "uniform":
            return self._fgsm(seed)(model, x, y, threat)
        noise = Draws(x, derive_seed(seed, "noise")).uniform(x[0].numel()).view_as(x).to(x.dtype)
        noisy = (x + self.noise * threat.epsilon * (2 * noise - 1)).clamp(0, 1)
        with pristine(model, seed=seed):
            gradient = input_gradient(model, noisy, y).gradient
        return (noisy + self._stride * threat.epsilon * gradient.sign()).clamp(0, 1)

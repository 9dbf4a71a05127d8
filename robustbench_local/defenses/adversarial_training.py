"""Training on the perturbed images that an attack finds on the way."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from robustbench_local.attacks import PGD, Attack
from robustbench_local.defenses.recipe import Criterion, Recipe
from robustbench_local.errors import UserError
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels, Logits, Model


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Recipe):
    """PGD adversarial training (Madry et al. 2018, arXiv:1706.06083).

    - `attack` finds the images to train on, within `threat`: the training budget, which is not the
      budget of the evaluation. It is the same class that evaluates, without early stop.
    - `validation` measures every epoch, at the full training budget.
    - `epsilon_ramp`: the share of the training over which epsilon grows from 0, linearly. 0 for
      none. Epochs that begin before its end are not selected.

    Deviations from the paper: the ramp, without which MNIST at linf 0.3 often ends in a constant
    prediction, and images crafted with the network in eval mode.
    """

    adversarial: ClassVar[bool] = True

    attack: Attack
    threat: ThreatModel
    validation: Attack = PGD(steps=10, step_size=0.25)  # noqa: RUF009  # frozen, so shared safely
    epsilon_ramp: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon_ramp <= 1:
            raise UserError(
                f"epsilon_ramp={self.epsilon_ramp:g}; expected the share of the training over "
                "which epsilon grows, from 0 to 1"
            )
        self.attack.require(self.threat)
        self.validation.require(self.threat)

    def loss(
        self,
        model: Model,
        x: Images,
        y: Labels,
        *,
        criterion: Criterion,
        progress: float,
        step: int,
        seed: int,
    ) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`."""
        share = 1.0 if self.settled(progress) else progress / self.epsilon_ramp
        threat = replace(self.threat, epsilon=self.threat.epsilon * share)
        attack = replace(self.attack, seed=derive_seed(seed, step))
        logits: Logits = model(attack(model, x, y, threat))
        return criterion(logits, y), logits

    def validation_attack(self) -> tuple[Attack, ThreatModel]:
        """See `Recipe.validation_attack`."""
        return self.validation, self.threat

    def settled(self, progress: float) -> bool:
        """Whether epsilon has reached its full size."""
        return progress >= self.epsilon_ramp

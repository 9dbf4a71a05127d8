"""Training on the perturbed images that an attack finds on the way."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from robustbench_local.attacks import PGD, Attack
from robustbench_local.defenses.recipe import Objective, Recipe
from robustbench_local.defenses.settings import read_number, require_attack, require_budget
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Criterion, Step
from robustbench_local.types import Images, Labels, Logits, Model


@dataclass(frozen=True, kw_only=True)
class AdversarialRecipe(Recipe):
    """What all training on perturbed images has in common; a subclass says how to `craft` them.

    - `threat`: the training budget, which is not the budget of the evaluation.
    - `validation` measures every epoch, at the full training budget.
    - `epsilon_ramp`: the share of the training over which epsilon grows from 0, linearly. 0 for
      none.
    """

    adversarial: ClassVar[bool] = True
    draws_by_image: ClassVar[bool] = True
    key: ClassVar[str]
    """Where its settings are found in the configuration, for messages."""

    threat: ThreatModel
    validation: Attack = PGD(steps=10, step_size=0.25)  # noqa: RUF009  # frozen, so shared safely
    epsilon_ramp: float = 0.5

    def __post_init__(self) -> None:
        ramp = read_number(
            f"{self.key}.epsilon_ramp",
            self.epsilon_ramp,
            fits=lambda share: 0 <= share <= 1,
            expected="the share of the training over which epsilon grows, from 0 to 1",
            example=0.5,
        )
        object.__setattr__(self, "epsilon_ramp", ramp)
        require_attack(f"{self.key}.validation", self.validation)
        require_budget(f"{self.key}.threat", self.threat)
        self.validation.require(self.threat)

    @abstractmethod
    def craft(self, model: Model, x: Images, y: Labels, threat: ThreatModel, seed: int) -> Images:
        """The images to train on, for a `model` in train mode, which is left so.

        `threat` has the epsilon of this step, every draw derives from `seed`.
        """

    def risk(
        self, model: Model, x: Images, x_adv: Images, y: Labels, criterion: Criterion
    ) -> tuple[Tensor, Logits]:
        """The loss on images and what was crafted from them; the logits are those of `x_adv`."""
        logits: Logits = model(x_adv)
        return criterion(logits, y), logits

    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`."""
        return self.objective(model, step)(model)

    def objective(self, model: Model, step: Step) -> Objective:
        """See `Recipe.objective`."""
        share = 1.0 if self.settled(step.progress) else step.progress / self.epsilon_ramp
        threat = replace(self.threat, epsilon=self.threat.epsilon * share)
        x, y = step.x, step.y
        x_adv = self.craft(model, x, y, threat, derive_seed(step.seed, step.number))
        return lambda network: self.risk(network, x, x_adv, y, step.criterion)

    def validation_attack(self) -> tuple[Attack, ThreatModel]:
        """See `Recipe.validation_attack`."""
        return self.validation, self.threat

    def settled(self, progress: float) -> bool:
        """Whether epsilon has reached its full size."""
        return progress >= self.epsilon_ramp


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(AdversarialRecipe):
    """PGD adversarial training (Madry et al. 2018, arXiv:1706.06083).

    `attack` finds the images to train on, within `threat`: the same class that evaluates, without
    early stop. The other fields are those of `AdversarialRecipe`.

    Deviations from the paper: the ramp, without which MNIST at linf 0.3 often ends in a constant
    prediction, and images crafted with the network in eval mode.
    """

    key: ClassVar[str] = "defense.recipe.adversarial_training"

    attack: Attack

    def __post_init__(self) -> None:
        super().__post_init__()
        require_attack(f"{self.key}.attack", self.attack)
        self.attack.require(self.threat)

    def craft(self, model: Model, x: Images, y: Labels, threat: ThreatModel, seed: int) -> Images:
        """See `AdversarialRecipe.craft`."""
        return replace(self.attack, seed=seed)(model, x, y, threat)

"""TRADES: what is right on clean images, and the same there as on perturbed ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_local.attacks import Attack
from robustbench_local.defenses.adversarial_training import AdversarialTraining
from robustbench_local.defenses.settings import read_number, require_count
from robustbench_local.gradients import input_gradient
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Criterion
from robustbench_local.types import Access, Images, Labels, Logits, Model, Norm


@dataclass(frozen=True, kw_only=True)
class Trades(AdversarialTraining):
    """cross-entropy(x) + beta * KL(p(x) || p(x_adv)) (Zhang et al. 2019, arXiv:1901.08573).

    `beta`, 1/lambda in the paper, buys robust accuracy with clean accuracy. `attack` climbs the
    same divergence, see `DivergenceAscent`; another, such as PGD, may take its place. The gradient
    goes through both predictions, as in the authors' code.

    Deviation from the paper: the ramp of epsilon, as in `AdversarialTraining`.
    """

    key: ClassVar[str] = "defense.recipe.trades"

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        beta = read_number(
            f"{self.key}.beta",
            self.beta,
            fits=lambda weight: weight > 0,
            expected="a weight above 0",
            example=6,
        )
        object.__setattr__(self, "beta", beta)

    def risk(
        self, model: Model, x: Images, x_adv: Images, y: Labels, criterion: Criterion
    ) -> tuple[Tensor, Logits]:
        """See `AdversarialRecipe.risk`."""
        clean: Logits = model(x)
        perturbed: Logits = model(x_adv)
        apart = F.kl_div(
            perturbed.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True
        )
        return criterion(clean, y) + self.beta * apart, perturbed


@dataclass(frozen=True, kw_only=True)
class DivergenceAscent(Attack):
    """Projected ascent of KL(p(x) || p(x_adv)), with p the softmax: the attack inside TRADES.

    It needs no labels. `steps`, and `step_size` as a fraction of epsilon.

    Deviation from the paper: the start is drawn uniformly from the ball, not from a normal
    distribution of deviation 0.001, which few steps would not get far from.
    """

    needs: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2", "l1"})

    steps: int = 10
    step_size: float = 0.25

    def __post_init__(self) -> None:
        require_count("defense.recipe.trades.attack.steps", self.steps, example=10)
        size = read_number(
            "defense.recipe.trades.attack.step_size",
            self.step_size,
            fits=lambda size: size > 0,
            expected="a fraction of epsilon above 0",
            example=0.25,
        )
        object.__setattr__(self, "step_size", size)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The last iterate."""
        with torch.no_grad():
            clean = model(x).log_softmax(1)

        def divergence(logits: Logits, labels: Labels, rows: slice) -> Tensor:
            apart = F.kl_div(logits.log_softmax(1), clean[rows], reduction="none", log_target=True)
            return apart.sum(1)

        x_adv = threat.random_start(x, Draws(x, derive_seed(self.seed, "divergence")))
        stride = threat.radius(x, self.step_size)
        for step in range(self.steps):
            gradient = input_gradient(model, x_adv, y, loss=divergence).gradient
            progress = step / max(1, self.steps - 1)
            move = threat.direction(gradient, x_adv, stride, progress=progress)
            x_adv = threat.project(x_adv + stride * move, x)
        return x_adv

"""Random noise of the size of the budget: the floor that every attack must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.gradients import resists
from robustbench_local.oracle import ask
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """Uniformly drawn points of the budget; the first one the victim gets wrong is kept.

    `samples` draws per example, with label access only. No paper: the control experiment of
    Carlini et al. 2019 (arXiv:1902.06705, section 5).
    """

    needs: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2", "l1", "l0", "spatial"})
    per_example_radius: ClassVar[bool] = True

    samples: int = 10

    def __post_init__(self) -> None:
        require_count("samples", self.samples)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Draw, look, and keep what is misclassified; survivors draw again."""
        best = x.clone()
        draws = Draws(x, derive_seed(self.seed, "noise"))
        alive = torch.arange(len(x), device=x.device)
        for _ in range(self.samples):
            x_adv = threat[alive].random_start(x[alive], draws)
            with torch.no_grad():
                short = resists(ask(model, x_adv, alive), y[alive])
            best[alive] = x_adv
            going = short.nonzero().squeeze(1)
            if len(going) == 0:
                break
            alive, draws = alive[going], draws[going]
        return best

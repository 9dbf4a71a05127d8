"""MART: adversarial training that cares most about what is misclassified anyway."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustbench_local.defenses.adversarial_training import AdversarialTraining
from robustbench_local.defenses.settings import read_number
from robustbench_local.training.step import Criterion
from robustbench_local.types import Images, Labels, Logits, Model


@dataclass(frozen=True, kw_only=True)
class Mart(AdversarialTraining):
    """BCE(x_adv) + weight * KL(p(x) || p(x_adv)) * (1 - p_y(x)) (Wang et al., ICLR 2020).

    openreview.net/forum?id=rklOg6EFwS. BCE, boosted cross-entropy, adds to the cross-entropy
    -log(1 - p_k(x_adv)) for the most likely wrong class k. `weight` is lambda in the paper. The
    gradient goes through both predictions and the factor, as in the authors' code, which also
    adds the 1e-4 that keeps the logarithm finite.

    Deviation from the paper: the ramp of epsilon, as in `AdversarialTraining`.
    """

    key: ClassVar[str] = "defense.recipe.mart"

    weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = read_number(
            f"{self.key}.weight",
            self.weight,
            fits=lambda weight: weight >= 0,
            expected="0 or more",
            example=5,
        )
        object.__setattr__(self, "weight", weight)

    def risk(
        self, model: Model, x: Images, x_adv: Images, y: Labels, criterion: Criterion
    ) -> tuple[Tensor, Logits]:
        """See `AdversarialRecipe.risk`."""
        clean: Tensor = model(x).log_softmax(1)
        perturbed: Logits = model(x_adv)
        found = perturbed.log_softmax(1)
        wrong = found.exp().scatter(1, y[:, None], 0.0).amax(1)
        boosted = criterion(perturbed, y) - (1.0001 - wrong).log().mean()
        apart = F.kl_div(found, clean, reduction="none", log_target=True).sum(1)
        missed = 1 - clean.gather(1, y[:, None]).squeeze(1).exp()
        return boosted + self.weight * (apart * missed).mean(), perturbed

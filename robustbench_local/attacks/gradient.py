"""Projected gradient descent, and FGSM as its one-step special case."""

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.errors import UserError
from robustbench_local.gradients import Loss, attack_loss, input_gradient, is_correct, is_randomized
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083) for linf, l2 and l1.

    FGSM (Goodfellow et al. 2015, arXiv:1412.6572) is `steps=1, step_size=1, random_start=False`.

    - `steps`, and `step_size` as a fraction of epsilon.
    - `restarts`: only examples that survived are attacked again, each time from a fresh start.
    - `loss`: see `attack_loss`. `eot_samples`: forward passes averaged at each step.
    - `early_stop`: an example that is misclassified leaves the batch at once. Only for
      deterministic victims; it is off by itself where the victim declares randomness or
      `eot_samples` is above 1.
    - `best_iterate`: return the iterate of highest loss, not the last one. Off by itself for
      randomised victims too: the highest of many noisy losses is a lucky draw, not a good point.

    Deviations from the paper: the two switches above (both only make it stronger), a uniform
    random start for every norm, and the l1 step (see `ThreatModel.direction`).
    """

    needs: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2", "l1"})

    steps: int = 40
    step_size: float = 0.1
    restarts: int = 1
    random_start: bool = True
    loss: Loss = "ce"
    eot_samples: int = 1
    early_stop: bool = True
    best_iterate: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "eot_samples"):
            require_count(name, getattr(self, name))
        if self.loss not in get_args(Loss):
            raise UserError(
                f"attack.loss={self.loss} is unknown; expected one of {', '.join(get_args(Loss))}"
            )
        if not self.step_size > 0:  # also NaN
            raise UserError(
                f"attack.step_size={self.step_size:g}; expected a fraction of epsilon above 0"
            )
        if self.restarts > 1 and not self.random_start:
            raise UserError(
                f"attack.restarts={self.restarts} would repeat the same run without a random "
                "start; type attack.random_start=true or attack.restarts=1"
            )

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """All restarts, each on the survivors of the ones before."""
        settled = self.eot_samples == 1 and not is_randomized(model)
        search = _Search(x, settled=settled, stop=self.early_stop, keep=self.best_iterate)
        for restart in range(self.restarts):
            alive = search.alive()
            if len(alive) == 0:
                break
            draws = Draws(x[alive], derive_seed(self.seed, "pgd", restart))
            self._climb(model, x[alive], y[alive], threat, draws, alive, search)
        return search.best

    def _climb(
        self,
        model: Model,
        x: Images,
        y: Labels,
        threat: ThreatModel,
        draws: Draws,
        index: Tensor,
        search: "_Search",
    ) -> None:
        """One ascent of the examples `index`; what it finds goes into `search`."""
        x_adv = threat.random_start(x, draws) if self.random_start else x
        for step in range(self.steps):
            look = input_gradient(model, x_adv, y, loss=self.loss, eot_samples=self.eot_samples)
            gradient = look.gradient
            # The unperturbed image is no candidate: the attack's own points are.
            if step > 0 or self.random_start:
                going = search.offer(index, x_adv, look.loss, look.correct)
                if going is not None:
                    if len(going) == 0:
                        return
                    x, y, index = x[going], y[going], index[going]
                    x_adv, gradient = x_adv[going], gradient[going]
            stride = self.step_size * threat.epsilon
            progress = step / max(1, self.steps - 1)
            move = threat.direction(gradient, x_adv, stride, progress=progress)
            x_adv = threat.project(x_adv + stride * move, x)
        if self.restarts == 1 and not (search.stop or search.keep):
            search.best[index] = x_adv  # nothing to compare with: a forward pass saved
            return
        with torch.no_grad():
            loss, correct = self._measure(model, x_adv, y)
        search.offer(index, x_adv, loss, correct, final=True)

    def _measure(self, model: Model, x: Images, y: Labels) -> tuple[Tensor, Tensor]:
        """Mean loss, and whether correct in every sample, of the last iterate."""
        outputs = [model(x) for _ in range(self.eot_samples)]
        loss = torch.stack([attack_loss(logits, y, self.loss) for logits in outputs]).mean(0)
        correct = torch.stack([is_correct(logits, y) for logits in outputs]).all(0)
        return loss, correct


class _Search:
    """The best point so far of every example, and which examples are still being attacked.

    Only a `settled` victim gives the same answer twice: for any other a misclassified draw neither
    stops an example nor beats a higher mean loss, and iterates are not compared with each other,
    since the best of many noisy losses is the luckiest. Then `stop` and `keep` are off.
    """

    def __init__(self, x: Images, *, settled: bool, stop: bool, keep: bool) -> None:
        self.stop = stop and settled
        self.keep = keep and settled
        self.best = x.clone()
        self._settled = settled
        self._loss = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
        self._broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def alive(self) -> Tensor:
        """Indices of the examples to attack; all of them unless broken ones may stop."""
        if self.stop:
            return (~self._broken).nonzero().squeeze(1)
        return torch.arange(len(self.best), device=self.best.device)

    def offer(
        self, index: Tensor, x_adv: Images, loss: Tensor, correct: Tensor, *, final: bool = False
    ) -> Tensor | None:
        """Take those points of the examples `index` that are better than what is held.

        Returns the rows to go on with, or `None` for all of them. A misclassified point beats any
        correct one, then the loss decides. Without `keep` the points on the way are taken only
        where an example stops; the `final` ones always compete, with those of other restarts.
        """
        broken = ~correct if self._settled else torch.zeros_like(correct)
        if self.keep or final:
            held = self._broken[index]
            better = (broken & ~held) | ((broken == held) & (loss > self._loss[index]))
        elif self.stop:
            better = broken
        else:
            return None
        rows = better.nonzero().squeeze(1)
        if len(rows):
            places = index[rows]
            self.best[places] = x_adv[rows]
            self._loss[places] = loss[rows].to(self._loss.dtype)
            self._broken[places] = broken[rows]
        if self.stop and not final and bool(broken.any()):
            return correct.nonzero().squeeze(1)
        return None

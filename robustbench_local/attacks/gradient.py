"""Projected gradient descent, and FGSM as its one-step special case."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
from torch import Tensor

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.errors import UserError
from robustbench_local.gradients import (
    Loss,
    attack_loss,
    input_gradient,
    require_classes,
    resists,
)
from robustbench_local.oracle import is_settled
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm

if TYPE_CHECKING:
    from robustbench_local.data import Dataset


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083) for linf, l2 and l1.

    FGSM (Goodfellow et al. 2015, arXiv:1412.6572) is `steps=1, step_size=1, random_start=False`.

    - `steps`, and `step_size` as a fraction of epsilon.
    - `restarts`: only examples that survived are attacked again, each time from a fresh start.
    - `loss`: see `attack_loss`. `eot_samples`: forward passes averaged at each step.
    - `early_stop`: an example that is misclassified leaves the batch at once. Only for
      deterministic victims, see `is_settled`; else it is off by itself.
    - `best_iterate`: return the iterate of highest loss, not the last one. Off by itself for
      randomised victims too: the highest of many noisy losses is a lucky draw, not a good point.
    - `target`: the class to reach (Kurakin et al. 2017, arXiv:1607.02533), see `attacks.target`.

    Deviations from the paper: the two switches above (both only make it stronger), a uniform
    random start for every norm, and the l1 step (see `ThreatModel.direction`).
    """

    needs: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2", "l1"})
    per_example_radius: ClassVar[bool] = True

    steps: int = 40
    step_size: float = 0.1
    restarts: int = 1
    random_start: bool = True
    loss: Loss = "ce"
    eot_samples: int = 1
    early_stop: bool = True
    best_iterate: bool = True
    target: Target = None

    def __post_init__(self) -> None:
        check_target(self.target)
        for name in ("steps", "restarts", "eot_samples"):
            require_count(name, getattr(self, name))
        if self.loss not in get_args(Loss):
            raise UserError(
                f"attack.loss={self.loss} is unknown; expected one of {', '.join(get_args(Loss))}"
            )
        if self.target is not None and self.loss == "dlr":
            raise UserError(
                "attack.loss=dlr aims at no class: its denominator rewards other ones; type "
                "attack.loss=margin or choose attack=apgd_t"
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

    def check(self, data: "Dataset", threat: ThreatModel) -> None:
        """Raise `UserError` also for a loss that so few classes do not have."""
        super().check(data, threat)
        require_classes(self.loss, data.num_classes)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """All restarts, each on the survivors of the ones before."""
        y, _ = self.goal(model, x, y)
        settled = is_settled(model, self.eot_samples)
        search = _Search(x, settled=settled, stop=self.early_stop, keep=self.best_iterate)
        for restart in range(self.restarts):
            alive = search.alive()
            if len(alive) == 0:
                break
            draws = Draws(x[alive], derive_seed(self.seed, "pgd", restart))
            self._climb(model, x[alive], y[alive], threat[alive], draws, alive, search)
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
        stride = threat.radius(x, self.step_size)
        ball = threat.ball(x)
        del x  # not in step with the others once images have left
        for step in range(self.steps):
            look = input_gradient(
                model, x_adv, y,
                loss=self.loss, eot_samples=self.eot_samples, targeted=self.target is not None,
            )  # fmt: skip
            gradient = look.gradient
            # The unperturbed image is no candidate: the attack's own points are.
            if step > 0 or self.random_start:
                leaving = search.offer(index, x_adv, look.loss, look.resists)
                if leaving is not None:
                    rows = _close_ranks(leaving, x_adv, gradient, *ball)
                    count = len(rows)
                    if count == 0:
                        return
                    y, index, threat = y[rows], index[rows], threat[rows]
                    x_adv, gradient = x_adv[:count], gradient[:count]
                    ball = tuple(part[:count] for part in ball)
                    stride = threat.radius(x_adv, self.step_size)
            progress = step / max(1, self.steps - 1)
            move = self.direction(threat, gradient, x_adv, stride, progress=progress)
            x_adv = threat.project_into(ball, move.mul_(stride).add_(x_adv))
        if self.restarts == 1 and not (search.stop or search.keep):
            search.best[index] = x_adv  # nothing to compare with: a forward pass saved
            return
        with torch.no_grad():
            loss, short = self._measure(model, x_adv, y)
        search.offer(index, x_adv, loss, short, final=True)

    def direction(
        self,
        threat: ThreatModel,
        gradient: Tensor,
        x_adv: Images,
        stride: Tensor,
        *,
        progress: float,
    ) -> Tensor:
        """A fresh tensor: the step of unit size, of which `stride` is taken.

        `progress` runs from 0 to 1.
        """
        return threat.direction(gradient, x_adv, stride, progress=progress)

    def _measure(self, model: Model, x: Images, y: Labels) -> tuple[Tensor, Tensor]:
        """Mean loss of the last iterate, and whether it is short of the goal in every sample."""
        targeted = self.target is not None
        outputs = [model(x) for _ in range(self.eot_samples)]
        losses = [attack_loss(logits, y, self.loss, targeted=targeted) for logits in outputs]
        short = [resists(logits, y, targeted=targeted) for logits in outputs]
        return torch.stack(losses).mean(0), torch.stack(short).all(0)


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
        self, index: Tensor, x_adv: Images, loss: Tensor, resists: Tensor, *, final: bool = False
    ) -> Tensor | None:
        """Take those points of the examples `index` that are better than what is held.

        Returns which of them leave, (N,) bool, or `None` where none does. A point that reached the
        goal beats any that `resists`, then the loss decides. Without `keep` the points on the way
        are taken only where an example stops; the `final` ones always compete, with those of other
        restarts.
        """
        broken = ~resists if self._settled else torch.zeros_like(resists)
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
            return broken
        return None


def _close_ranks(leaving: Tensor, *tensors: Tensor) -> Tensor:
    """Move the last of those that stay to the places of those that leave, within the `tensors`.

    Returns which row now stands in each of the first places, as many as stay. This writes a few
    rows where an index would copy every one, and few images leave at a time.
    """
    rows = torch.arange(len(leaving) - int(leaving.sum()), device=leaving.device)
    places = leaving[: len(rows)].nonzero().squeeze(1)
    if len(places):
        rows[places] = len(rows) + (~leaving[len(rows) :]).nonzero().squeeze(1)
        for tensor in tensors:
            tensor[places] = tensor[rows[places]]
    return rows

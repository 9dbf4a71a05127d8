"""Auto-PGD: gradient ascent that chooses its own step sizes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from robustbench_local.attacks.ascent import Ascent, BallAscent, Quest, SparseAscent, phases
from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.errors import UserError
from robustbench_local.gradients import (
    InputGradient,
    Loss,
    LossFunction,
    attack_loss,
    input_gradient,
    resists,
    targeted_dlr,
)
from robustbench_local.oracle import is_settled
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.rejection import class_scores
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Logits, Model, Norm

APGDLoss: TypeAlias = Literal["ce", "dlr", "dlr_targeted"]


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD (Croce and Hein 2020, arXiv:2003.01690); for l1 arXiv:2103.01208 by the same.

    - `steps`: gradients for each ascent. `restarts`: on the survivors of the ones before; `None`
      for one, and for ten under l1, where the starts matter more (AutoAttack has five).
    - `loss`: `ce` and `dlr` as in `attack_loss`; `dlr_targeted` makes one ascent towards each of
      the `targets` most likely wrong classes, each on the survivors of the ones before (APGD-T).
      Any wrong class is a success.
    - `rho`: the step of an example is halved where fewer than this share of its steps raised the
      loss since the last checkpoint (linf, l2).
    - `eot_samples`: forward passes averaged at each step, for randomised victims.
    - `random_start`. `target`: the class to reach, see `attacks.target`; not with `dlr_targeted`.

    linf, l2: steps from 2 epsilon, halved at the checkpoints of the paper, after which the ascent
    goes on from the best point. l1: sparse steps whose support follows that of the best point, at
    three, two and one epsilon for 30%, 30% and 40% of the steps.

    Deviations. Misclassified examples leave at once (deterministic victims only). Cross-entropy is
    climbed in its log-odds form, which does not saturate. With too few classes for a DLR (fewer
    than 3, targeted 4) the plain difference of the logits is climbed, and there are at most K - 1
    targets. l2 projections are exact on ball and box together. l1 steps leave out the entries that
    the box holds. A `target` under `dlr` is climbed by the targeted ratio, against the strongest
    other class. Of a randomised victim the best and the last point are compared on fresh draws.
    """

    needs: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2", "l1"})
    per_example_radius: ClassVar[bool] = True

    steps: int = 100
    restarts: int | None = 1
    loss: APGDLoss = "ce"
    targets: int = 9
    rho: float = 0.75
    eot_samples: int = 1
    random_start: bool = True
    target: Target = None

    def __post_init__(self) -> None:
        check_target(self.target)
        for name in ("steps", "restarts", "targets", "eot_samples"):
            if name != "restarts" or self.restarts is not None:
                require_count(name, getattr(self, name))
        if self.loss not in get_args(APGDLoss):
            raise UserError(
                f"attack.loss={self.loss} is unknown; expected one of "
                f"{', '.join(get_args(APGDLoss))}"
            )
        if not 0 < self.rho < 1:  # also NaN
            raise UserError(f"attack.rho={self.rho:g}; expected a share above 0 and below 1")
        if self.restarts != 1 and not self.random_start:
            raise UserError(
                f"attack.restarts={self.restarts} would repeat the same run without a random "
                "start; type attack.random_start=true or attack.restarts=1"
            )
        if self.loss == "dlr_targeted" and self.target is not None:
            raise UserError(
                f"attack.loss=dlr_targeted chooses its classes and attack.target={self.target} is "
                "one already; type attack.loss=ce or attack.loss=dlr"
            )

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Every ascent, each on the survivors of the ones before."""
        y, _ = self.goal(model, x, y)
        restarts = self.restarts or (10 if threat.norm == "l1" else 1)
        found = _Found(x, settled=is_settled(model, self.eot_samples))
        for aim, wanted in enumerate(self._aims(model, x, y)):
            for restart in range(restarts):
                rows = found.alive()
                if len(rows) == 0:
                    return found.x_adv
                draws = Draws(x[rows], derive_seed(self.seed, "apgd", aim, restart))
                x_adv = self._start(x[rows], threat[rows], draws)
                quest = Quest(rows, x[rows], y[rows], wanted[rows], threat[rows])
                self._ascend(model, quest, x_adv, found)
        return found.x_adv

    def _aims(self, model: Model, x: Images, y: Labels) -> Iterator[Labels]:
        """What each ascent heads for: the labels, or one wrong class after the other."""
        if self.loss != "dlr_targeted":
            yield y
            return
        with torch.no_grad():
            looks = [class_scores(model(x)) for _ in range(self.eot_samples)]
        logits = torch.stack(looks).mean(0)
        count = min(self.targets, logits.shape[1] - 1)
        wrong = logits.scatter(1, y[:, None], -torch.inf).topk(count, dim=1).indices
        yield from wrong.unbind(1)

    def _start(self, x: Images, threat: ThreatModel, draws: Draws) -> Images:
        if not self.random_start:
            return x
        if threat.norm != "l1":
            return threat.random_start(x, draws)
        # Noise brought into the ball is sparse, unlike a point drawn uniformly from it.
        noise = draws.normal(x[0].numel()).view_as(x).to(x.dtype)
        return _widened(threat, phases(self.steps)[0][0]).project(x + noise, x)

    def _ascend(self, model: Model, quest: Quest, x_adv: Images, found: "_Found") -> None:
        """One ascent from `x_adv`; what it finds goes into `found`."""
        if quest.threat.norm != "l1":
            ascent: Ascent = BallAscent(quest, x_adv, steps=self.steps, rho=self.rho)
            self._climb(model, ascent, self.steps, found)
        else:
            for factor, steps in phases(self.steps):
                ball = _widened(quest.threat, factor)
                start = ball.project(x_adv, quest.x)
                ascent = SparseAscent(quest._replace(threat=ball), start, steps=steps)
                # A point of a wider ball is no answer.
                self._climb(model, ascent, steps, found if factor == 1 else None)
                x_adv = ascent.best
        if found.settled:
            found.offer(ascent.rows, ascent.best, ascent.best_loss)
            return
        # The highest of many noisy losses is a lucky draw, so fresh ones decide.
        for point in (ascent.best, ascent.x_adv):
            ascent.x_adv = point
            found.offer(ascent.rows, point, self._look(model, ascent, last=True).loss)

    def _climb(self, model: Model, ascent: Ascent, steps: int, found: "_Found | None") -> None:
        """All steps of an ascent; examples that are `found` leave it."""
        for step in range(steps + 1):
            look = self._look(model, ascent, last=step == steps)
            loss, gradient = look.loss, look.gradient
            going = found.take(ascent.rows, ascent.x_adv, look.resists) if found else None
            if going is not None:
                ascent.keep(going)
                if len(going) == 0:
                    return
                loss, gradient = loss[going], gradient[going]
            ascent.note(loss, gradient)
            if step < steps:
                ascent.move(step)

    def _look(self, model: Model, ascent: Ascent, *, last: bool) -> InputGradient:
        """What the victim says where the ascent stands; at the `last` point, without gradient."""
        climbed, targeted = self._climbed(ascent.wanted), self.target is not None
        if not last:
            return input_gradient(
                model, ascent.x_adv, ascent.y,
                loss=climbed, eot_samples=self.eot_samples, targeted=targeted,
            )  # fmt: skip
        with torch.no_grad():
            outputs = [model(ascent.x_adv) for _ in range(self.eot_samples)]
        loss = torch.stack([climbed(logits, ascent.y, slice(None)) for logits in outputs]).mean(0)
        short = [resists(logits, ascent.y, targeted=targeted) for logits in outputs]
        return InputGradient(ascent.gradient, loss, torch.stack(short).all(0))

    def _climbed(self, wanted: Labels) -> LossFunction:
        """The loss of this attack; it knows the number of classes when it sees the logits."""
        if self.loss == "dlr_targeted":
            return lambda logits, y, rows: targeted_dlr(logits, y, wanted[rows])

        def loss(logits: Logits, y: Labels, rows: slice) -> Tensor:
            if self.loss == "dlr" and self.target is not None:
                # The plain ratio is constant where the class wanted is the third.
                others = class_scores(logits).scatter(1, y[:, None], -torch.inf)
                return targeted_dlr(logits, others.argmax(1), y)
            few = class_scores(logits).shape[1] < 3
            name: Loss = "ce" if self.loss == "ce" else "margin" if few else "dlr"
            return attack_loss(logits, y, name, targeted=self.target is not None)

        return loss


class _Found:
    """What the attack returns, and which examples it still works on.

    Only a `settled` victim gives the same answer twice: for any other one misclassified draw
    proves nothing, and every example goes through the whole attack.
    """

    def __init__(self, x: Images, *, settled: bool) -> None:
        self.settled = settled
        self.x_adv = x.clone()
        self._loss = torch.full((len(x),), -torch.inf, device=x.device)
        self._done = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def alive(self) -> Tensor:
        """Indices of the examples that still resist."""
        return (~self._done).nonzero().squeeze(1)

    def take(self, rows: Tensor, x_adv: Images, resists: Tensor) -> Tensor | None:
        """Keep the points that reached the goal; which of the rows go on, `None` for all."""
        if not self.settled or bool(resists.all()):
            return None
        hit = (~resists).nonzero().squeeze(1)
        self.x_adv[rows[hit]] = x_adv[hit]
        self._done[rows[hit]] = True
        return resists.nonzero().squeeze(1)

    def offer(self, rows: Tensor, x_adv: Images, loss: Tensor) -> None:
        """The best point of an ascent that did not reach the goal; the highest loss is kept."""
        better = (loss > self._loss[rows]).nonzero().squeeze(1)
        self.x_adv[rows[better]] = x_adv[better]
        self._loss[rows[better]] = loss[better].to(self._loss.dtype)


def _widened(threat: ThreatModel, factor: int) -> ThreatModel:
    """The same threat model with `factor` times the radius."""
    if threat.radii is not None:
        return threat.per_example(factor * threat.radii)
    return replace(threat, epsilon=factor * threat.epsilon)

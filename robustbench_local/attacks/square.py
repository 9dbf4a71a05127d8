"""Square attack: random search with scores alone, in square windows at random places."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.square_windows import (
    propose_l1,
    propose_l2,
    propose_linf,
    side_length,
    stripes,
    tiles_l1,
    tiles_l2,
)
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.errors import UserError
from robustbench_local.gradients import Loss, attack_loss, resists
from robustbench_local.oracle import ask, is_settled
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack (Andriushchenko et al. 2020, arXiv:1912.00049) for linf, l2 and l1.

    Random search: a change of one random window is kept where the margin falls. Each image has
    windows and signs of its own and leaves the batch when it is broken.

    - `queries`: forward passes per image and restart, the first one included. A smaller
      `threat.query_budget` shortens the search, and its schedule with it.
    - `initial_share`: the share of the pixels in the first windows (p in the paper); it is halved
      nine times, at the paper's share of the queries.
    - `restarts`: only examples that survived are attacked again.
    - `eot_samples`: queries averaged for each look at an image. For randomised victims (see
      `is_settled`) no image stops early, and the margin of the current point is asked for again in
      each step, since the best of many noisy answers is a lucky one: twice the cost.
    - `target`: the class to reach, see `attacks.target`; climbs cross-entropy as in the paper.

    Deviations from the paper: its share of 0.05 (linf) and 0.1 (l2) for ImageNet is 0.8 as in the
    authors' AutoAttack; l1 is that of Croce and Hein 2021 (arXiv:2103.01208); windows reach the
    last row and column too; a window that would change nothing is pushed the other way; under l2
    and l1 images need not be square.
    """

    needs: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2", "l1"})
    per_example_radius: ClassVar[bool] = True

    queries: int = 5000
    initial_share: float = 0.8
    restarts: int = 1
    eot_samples: int = 1
    target: Target = None

    def __post_init__(self) -> None:
        check_target(self.target)
        for name in ("queries", "restarts", "eot_samples"):
            require_count(name, getattr(self, name))
        if not 0 < self.initial_share <= 1:  # also NaN
            raise UserError(
                f"attack.initial_share={self.initial_share:g}; expected a share of the pixels "
                "above 0 and up to 1"
            )
        if self.queries < self.eot_samples:
            raise UserError(
                f"attack.queries={self.queries} is not enough for one look of "
                f"attack.eot_samples={self.eot_samples}; raise the one or lower the other"
            )

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """All restarts, each on the survivors of the ones before."""
        y, targeted = self.goal(model, x, y)
        search = _Search(model, x, y, threat, targeted=targeted, samples=self.eot_samples)
        left = self.queries * self.restarts
        if threat.query_budget is not None:
            left = min(left, threat.query_budget)
        if targeted:
            left -= 1  # the goal asks for the number of classes, or the least likely one
        for restart in range(self.restarts):
            rows = search.alive()
            if len(rows) == 0 or left < self.eot_samples:
                break
            draws = Draws(x[rows], derive_seed(self.seed, "square", restart))
            self._walk(search, rows, draws, min(self.queries, left))
            left -= self.queries
        return search.found

    def _walk(self, search: "_Search", rows: Tensor, draws: Draws, queries: int) -> None:
        """One random search of the examples `rows`."""
        norm = search.threat.norm
        start, propose = _MOVES[norm]
        x, radius = search.x[rows].contiguous(), search.threat[rows].radius(search.x)
        # One buffer that windows are written into, and taken back where they did not help.
        x_adv = start(x, radius, draws).contiguous()
        loss, short = search.look(x_adv, rows)
        cost = self.eot_samples if search.settled else 2 * self.eot_samples
        for spent in range(self.eot_samples, queries - cost + 1, cost):
            if search.settled and not bool(short.all()):
                search.finish(rows, x_adv, loss, short, broken_only=True)
                going = short.nonzero().squeeze(1)
                if len(going) == 0:
                    return
                rows, x, x_adv = rows[going], x[going], x_adv[going]
                loss, draws = loss[going], draws[going]
                radius = search.threat[rows].radius(search.x)
            side = side_length(self.initial_share, spent / queries, x, odd=norm != "linf")
            edits = propose(x, x_adv, radius, side, draws)
            if not search.settled:
                loss, _ = search.look(x_adv, rows)
            for edit in edits:
                edit.write(x_adv)
            changed, short = search.look(x_adv, rows)
            accepted = (changed > loss) | ~short if search.settled else changed > loss
            for edit in edits:
                edit.write(x_adv, accepted)
            loss = torch.where(accepted, changed, loss)
        search.finish(rows, x_adv, loss, short)


_MOVES = {
    "linf": (stripes, propose_linf),
    "l2": (tiles_l2, propose_l2),
    "l1": (tiles_l1, propose_l1),
}
"""Where a search starts and what it tries, by norm."""


class _Search:
    """What is attacked, and the best point of every example so far."""

    def __init__(
        self,
        model: Model,
        x: Images,
        y: Labels,
        threat: ThreatModel,
        *,
        targeted: bool,
        samples: int,
    ) -> None:
        self.x, self.threat = x, threat
        self.found = x.clone()
        self.settled = is_settled(model, samples)
        self._model, self._y, self._targeted, self._samples = model, y, targeted, samples
        self._loss = torch.full((len(x),), -torch.inf, device=x.device)
        self._broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def alive(self) -> Tensor:
        """The examples still to attack."""
        return (~self._broken).nonzero().squeeze(1)

    def look(self, x_adv: Images, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The loss the attack climbs, and which images are short of the goal in some sample."""
        y = self._y[rows]
        name: Loss = "ce" if self._targeted else "margin"
        losses, short = [], torch.zeros(len(rows), dtype=torch.bool, device=x_adv.device)
        for _ in range(self._samples):
            with torch.no_grad():
                logits = ask(self._model, x_adv, rows)
            losses.append(attack_loss(logits, y, name, targeted=self._targeted))
            short |= resists(logits, y, targeted=self._targeted)
        return torch.stack(losses).mean(0), short

    def finish(
        self,
        rows: Tensor,
        x_adv: Images,
        loss: Tensor,
        short: Tensor,
        *,
        broken_only: bool = False,
    ) -> None:
        """Keep the points of a search that ends, where they beat those of earlier ones."""
        broken = ~short if self.settled else torch.zeros_like(short)
        better = broken if broken_only else broken | (loss > self._loss[rows])
        places = rows[better]
        self.found[places] = x_adv[better]
        self._loss[places] = loss[better].to(self._loss.dtype)
        self._broken[places] = broken[better]

"""How Auto-PGD walks: the state of an ascent, and the two rules for its steps.

linf and l2: Croce and Hein 2020, arXiv:2003.01690; l1: Croce and Hein 2021, arXiv:2103.01208.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels

MOMENTUM = 0.75
"""The share of the new step in a move; the rest repeats the move before."""


class Quest(NamedTuple):
    """What an ascent is after: a row of everything for each of N examples.

    `rows` says which examples of the batch they are, shape (N,).
    """

    rows: Tensor
    x: Images
    y: Labels
    wanted: Labels
    threat: ThreatModel


class Ascent(ABC):
    """Where each example stands, a row for each: one ascent of `steps` gradients in one ball.

    Every tensor held here has a row for each, so that `keep` can let some go.
    """

    def __init__(self, quest: Quest, x_adv: Images) -> None:
        self.rows, self.x, self.y, self.wanted, self.threat = quest
        x = self.x
        self.x_adv = self.before = self.best = x_adv
        self.gradient = self.best_gradient = torch.zeros_like(x)
        self.loss = torch.full((len(x),), torch.inf, device=x.device)
        self.best_loss = -self.loss

    def keep(self, going: Tensor) -> None:
        """Go on with these rows only."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor | ThreatModel):
                setattr(self, name, value[going])

    def note(self, loss: Tensor, gradient: Tensor) -> None:
        """What the victim said where the ascent stands."""
        better = loss > self.best_loss
        self.loss, self.gradient = loss, gradient
        self.best_loss = torch.where(better, loss, self.best_loss)
        mask = _per_image(better)
        self.best = torch.where(mask, self.x_adv, self.best)
        self.best_gradient = torch.where(mask, gradient, self.best_gradient)

    def _return_to_best(self, which: Tensor) -> None:
        mask = _per_image(which)
        self.x_adv = torch.where(mask, self.best, self.x_adv)
        self.gradient = torch.where(mask, self.best_gradient, self.gradient)

    @abstractmethod
    def move(self, step: int) -> None:
        """Take step number `step`, from 0."""


class BallAscent(Ascent):
    """linf and l2: steps of 2 epsilon with momentum, halved where they do not pay off."""

    def __init__(self, quest: Quest, x_adv: Images, *, steps: int, rho: float) -> None:
        super().__init__(quest, x_adv)
        x, threat = self.x, self.threat
        self._checkpoints, self._last, self._rho = set(checkpoints(steps)), 0, rho
        self.stride = threat.radius(x, 2).expand(len(x), 1, 1, 1)
        self.rises = torch.zeros(len(x), device=x.device)  # of the loss, since the last checkpoint
        self.halved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.checked_loss = self.best_loss

    def note(self, loss: Tensor, gradient: Tensor) -> None:
        """Also count how often the loss rose."""
        self.rises = self.rises + (loss > self.loss)
        super().note(loss, gradient)

    def move(self, step: int) -> None:
        """A gradient step and a part of the move before, each brought back into the threat."""
        if step == 0:
            self.checked_loss = self.best_loss
        elif step in self._checkpoints:
            self._reconsider(step)
        threat, x, x_adv = self.threat, self.x, self.x_adv
        direction = threat.direction(self.gradient, x_adv, self.stride)
        moved = threat.project(torch.addcmul(x_adv, self.stride, direction), x)
        if step > 0:
            blend = x_adv + MOMENTUM * (moved - x_adv) + (1 - MOMENTUM) * (x_adv - self.before)
            moved = threat.project(blend, x)
        self.x_adv, self.before = moved, x_adv

    def _reconsider(self, step: int) -> None:
        """Halve the step and go back to the best point where too few steps raised the loss.

        Or where neither step nor best loss have changed since the last checkpoint.
        """
        few = self.rises < self._rho * (step - self._last)
        stalled = ~self.halved & (self.best_loss <= self.checked_loss)
        self.halved = few | stalled
        self.stride = torch.where(_per_image(self.halved), self.stride / 2, self.stride)
        self._return_to_best(self.halved)
        self.rises = torch.zeros_like(self.rises)
        self.checked_loss, self._last = self.best_loss, step


class SparseAscent(Ascent):
    """l1: equal steps along the largest entries of the gradient; their number adapts.

    Every 4% of the steps it becomes two thirds of the entries that the best point has changed.
    Where these have become fewer by 5%, the step is epsilon again and the ascent goes on from the
    best point; elsewhere it shrinks by 1.5, to a tenth of epsilon at least.
    """

    def __init__(self, quest: Quest, x_adv: Images, *, steps: int) -> None:
        super().__init__(quest, x_adv)
        x, threat = self.x, self.threat
        self._every = max(1, int(0.04 * steps))
        self.longest = threat.radius(x).expand(len(x), 1, 1, 1)
        self.stride = self.longest
        self.support = self._support()
        # From the image itself nothing is known yet: a fifth of the entries.
        fifth = torch.full_like(self.support, 0.2 * x[0].numel())
        self.entries = torch.where(self.support > 0, self.support / 1.5, fifth)

    def move(self, step: int) -> None:
        """A step along the chosen entries, brought back into the threat model."""
        if step > 0 and step % self._every == 0:
            self._reconsider()
        gradient = self.gradient
        # An entry at the edge of the box cannot go further: its share would be lost.
        held = torch.where(gradient > 0, self.x_adv >= 1, self.x_adv <= 0)
        steep = gradient.abs().masked_fill(held, 0).flatten(1)
        last = self.entries.long().clamp(1, steep.shape[1]) - 1
        least = steep.sort(dim=1, descending=True).values.gather(1, last[:, None])
        chosen = ((steep >= least) & (steep > 0)).view_as(gradient)
        count = _per_image(chosen.flatten(1).sum(1).clamp(min=1))
        step_taken = self.stride / count * gradient.sign() * chosen
        self.before, self.x_adv = self.x_adv, self.threat.project(self.x_adv + step_taken, self.x)

    def _reconsider(self) -> None:
        support = self._support()
        sparser = support < 0.95 * self.support
        shorter = torch.maximum(self.stride / 1.5, self.longest / 10)
        self.stride = torch.where(_per_image(sparser), self.longest, shorter)
        self.entries, self.support = support / 1.5, support
        self._return_to_best(sparser)

    def _support(self) -> Tensor:
        """How many entries of the best point differ from the image, shape (N,)."""
        return (self.best != self.x).flatten(1).sum(1).float()


def checkpoints(steps: int) -> list[int]:
    """The steps at which `BallAscent` reconsiders its step sizes.

    Shares of all steps: 0.22, then each stretch shorter than the one before by 0.03 and never
    below 0.06; rounded up, counted in hundredths so that nothing else is rounded.
    """
    shares = [0, 22]
    while shares[-1] < 100:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 3, 6))
    return sorted({-(-share * steps // 100) for share in shares[1:] if share <= 100})


def phases(steps: int) -> list[tuple[int, int]]:
    """For l1: the multiple of epsilon, and how many steps are spent there, one after the other."""
    wide = int(0.3 * steps)
    return [(f, n) for f, n in ((3, wide), (2, wide), (1, steps - 2 * wide)) if n > 0]


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)

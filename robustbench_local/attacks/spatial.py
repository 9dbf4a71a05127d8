"""Rotations and translations, all of a grid."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local import spatial
from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.gradients import resists
from robustbench_local.oracle import ask, is_settled
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm


@dataclass(frozen=True, kw_only=True)
class Spatial(Attack):
    """Rotation and translation, by trying the whole grid (Engstrom et al. 2019, arXiv:1712.02779).

    The transforms of `robustbench_local.spatial` inside epsilon are tried in the order of their
    size, with label access only; the least one that the victim gets wrong is the result, and the
    very least of all where there is none. A query budget ends the search after so many of them.

    - `eot_samples`: forward passes for each transform. Of a randomised victim (see `is_settled`)
      all transforms are tried and the one most often wrong is the result: one lucky draw decides
      nothing.
    - `target`: the class to reach, see `attacks.target`.
    - `candidates`: images asked about at once where few are left. No effect on the result.

    Deviations from the paper: none in the grid; its worst-of-10 random choice is not offered, since
    the grid contains what it could find.
    """

    needs: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"spatial"})
    per_example_radius: ClassVar[bool] = True

    eot_samples: int = 1
    target: Target = None
    candidates: int = 256

    def __post_init__(self) -> None:
        check_target(self.target)
        require_count("eot_samples", self.eot_samples)
        require_count("candidates", self.candidates)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The least transform that reaches the goal, or the one that does most often."""
        y, targeted = self.goal(model, x, y)
        transforms: tuple[spatial.Transform, ...] = spatial.grid(threat.epsilon)
        if threat.query_budget is not None:
            left = threat.query_budget - (1 if targeted else 0)  # choosing targets asks once
            transforms = transforms[: left // self.eot_samples]
        settled = is_settled(model, self.eot_samples)
        limits = threat.radius(x.double()).flatten().expand(len(x)) + 1e-9
        best, wins = x.clone(), torch.full((len(x),), -1.0, device=x.device)
        alive = torch.arange(len(x), device=x.device)
        done = 0
        while done < len(transforms):
            alive = alive[limits[alive] >= transforms[done].share]
            if len(alive) == 0:
                break
            some = transforms[done : done + max(1, self.candidates // len(alive))]
            done += len(some)
            tried = torch.stack([spatial.apply(x[alive], transform) for transform in some])
            rate = self._rate(model, tried, y[alive], alive, targeted)  # (transforms, alive)
            shares = limits.new_tensor([transform.share for transform in some])
            rate = rate.masked_fill(shares[:, None] > limits[alive], -1)
            top, place = rate.max(0)  # the first of equal ones, which is the least transform
            better = top > wins[alive]
            rows = alive[better]
            best[rows] = tried[place[better], better.nonzero().squeeze(1)]
            wins[rows] = top[better]
            if settled:
                alive = alive[top <= 0]
        return best

    def _rate(
        self, model: Model, tried: Tensor, y: Labels, alive: Tensor, targeted: bool
    ) -> Tensor:
        """How often each of the images `tried` (T, N, C, H, W) reaches the goal, (T, N)."""
        flat, labels, owners = tried.flatten(0, 1), y.repeat(len(tried)), alive.repeat(len(tried))
        with torch.no_grad():
            reached = [
                ~resists(ask(model, flat, owners), labels, targeted=targeted)
                for _ in range(self.eot_samples)
            ]
        return torch.stack(reached).float().mean(0).view(len(tried), -1)

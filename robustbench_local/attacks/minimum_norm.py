"""What the attacks share that look for the smallest perturbation, whatever epsilon is."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.attacks.base import Attack
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.errors import UserError
from robustbench_local.gradients import is_randomized, pristine, resists
from robustbench_local.oracle import ask
from robustbench_local.randomness import Draws
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model

CONFIRMATIONS = 10
"""How many draws of a randomised victim must agree before a point counts as adversarial."""


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(Attack):
    """Searches the nearest image the victim gets wrong; epsilon only decides what is returned.

    Subclasses implement `search`. What it finds is then drawn back towards the image: by
    `boundary_steps` bisections of the radius, each projecting the point found so far on the ball,
    which for l2 is the segment between the two and for l0 drops the smallest changes. 0 leaves it
    as found. The papers do not have this; it never lengthens a perturbation.

    Images that are misclassified from the start come back as they are. Of a randomised victim a
    point counts only if `CONFIRMATIONS` draws agree: the nearest of many points would otherwise be
    the one with the luckiest draw.
    """

    needs: ClassVar[Access] = "gradients"
    minimum_norm: ClassVar[bool] = True
    per_example_radius: ClassVar[bool] = True

    boundary_steps: int = 10
    target: Target = None

    def __post_init__(self) -> None:
        check_target(self.target)
        require_whole("boundary_steps", self.boundary_steps)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The nearest adversarial images where these lie within epsilon, else the clean ones."""
        found = self._nearest(model, x, y, threat)
        inside = threat.size(found, x) <= threat.limits(x)
        return torch.where(inside.view(-1, 1, 1, 1), found, x)

    def nearest(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The nearest adversarial images under the norm of `threat`, however far away.

        Where nothing was found, and where nothing is needed, the clean image.
        """
        self.require(threat)
        x = x.detach()
        with pristine(model, seed=self.seed):
            return self._nearest(model, x, y, threat)

    def _nearest(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        found = x.clone()
        if len(x) == 0:
            return found
        y, targeted = self.goal(model, x, y)
        everyone = torch.arange(len(x), device=x.device)
        rows = (~_fools(model, x, y, targeted, everyone)).nonzero().squeeze(1)
        if len(rows):
            whole = ThreatModel(norm=threat.norm, epsilon=1)  # epsilon has no say in the search
            held = Nearest(model, x[rows], y[rows], whole, targeted=targeted, owners=rows)
            self.search(held)
            reached = held.size.isfinite().nonzero().squeeze(1)
            if len(reached):
                held.draw_back(held.best[reached], reached, self.boundary_steps)
            found[rows] = held.best
        return found

    @abstractmethod
    def search(self, held: "Nearest") -> None:
        """Offer points to `held`, which says what the images, labels and norm are."""


class Nearest:
    """The nearest adversarial point found so far of every example, and all that defines nearest.

    `size` is infinite where there is none yet; `best` is then the image itself.
    """

    def __init__(
        self,
        model: Model,
        x: Images,
        y: Labels,
        threat: ThreatModel,
        *,
        targeted: bool,
        owners: Tensor,
    ) -> None:
        self.model, self.x, self.y, self.targeted = model, x, y, targeted
        self.threat = threat  # its norm counts; radii are set where needed
        self.best = x.clone()
        self.size = torch.full((len(x),), torch.inf, device=x.device, dtype=torch.float64)
        self._owners = owners
        self._settled = not is_randomized(model)

    def fools(self, points: Images, rows: Tensor) -> Tensor:
        """Whether each point, of the examples `rows`, reaches the goal: one look at each."""
        with torch.no_grad():
            logits = ask(self.model, points, self._owners[rows])
        return ~resists(logits, self.y[rows], targeted=self.targeted)

    def offer(self, points: Images, fooled: Tensor, rows: Tensor | None = None) -> Tensor:
        """Take the points that `fooled` the victim and are nearer than what is held.

        Returns which points fooled it: fewer than were said to for a randomised victim, that is
        asked again about those that would be taken.
        """
        if rows is None:
            rows = torch.arange(len(self.x), device=points.device)
        if not bool(fooled.any()):
            return fooled
        size = self.threat.size(points, self.x[rows])
        nearer = (fooled & (size < self.size[rows])).nonzero().squeeze(1)
        if len(nearer) and not self._settled:
            asked = rows[nearer]
            sure = _fools(
                self.model, points[nearer], self.y[asked], self.targeted, self._owners[asked]
            )
            fooled = fooled.clone()
            fooled[nearer] = sure
            nearer = nearer[sure]
        self.best[rows[nearer]] = points[nearer]
        self.size[rows[nearer]] = size[nearer]
        return fooled

    def draw_back(self, points: Images, rows: Tensor, steps: int) -> Images:
        """Adversarial points of the examples `rows`, nearer by bisections of the radius.

        Each projects the point on a ball between the image and the nearest success so far.
        """
        x = self.x[rows]
        nearest, high = points, self.threat.size(points, x)
        low = torch.zeros_like(high)
        for _ in range(steps):
            middle = (low + high) / 2
            if self.threat.norm == "l0":
                middle = middle.floor()
            tried = self.threat.per_example(middle).project(points, x)
            fooled = self.offer(tried, self.fools(tried, rows), rows)
            nearest = torch.where(fooled.view(-1, 1, 1, 1), tried, nearest)
            low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
        return nearest


def _fools(model: Model, x: Images, y: Labels, targeted: bool, owners: Tensor) -> Tensor:
    """Whether each image reaches the goal, in every draw of a randomised victim."""
    fooled = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(CONFIRMATIONS if is_randomized(model) else 1):
        with torch.no_grad():
            fooled &= ~resists(ask(model, x, owners), y, targeted=targeted)
    return fooled


def diameter(threat: ThreatModel, x: Images) -> float:
    """The size of the largest perturbation there is: from one corner of the box to the other."""
    entries = x[0].numel()
    sizes = {"linf": 1.0, "l2": float(entries**0.5), "l1": float(entries)}
    return sizes.get(threat.norm, float(x[0, 0].numel()))


def feasible(gradient: Tensor, x_adv: Images) -> Tensor:
    """The gradient without the entries along which a pixel could only leave the box."""
    blocked = ((x_adv <= 0) & (gradient < 0)) | ((x_adv >= 1) & (gradient > 0))
    return gradient.masked_fill(blocked, 0)


def unit(gradient: Tensor, x: Images, seed: int) -> Tensor:
    """The gradient at Euclidean length 1, or a random direction where it is exactly zero.

    On a plateau any direction is as good as the others, and standing still is worse than all.
    """
    flat = gradient.flatten(1)
    # Scaled first: squares of tiny float32 gradients would underflow.
    largest = flat.abs().amax(1, keepdim=True)
    flat = flat / largest.clamp(min=1e-38)
    flat_rows = (largest.squeeze(1) < 1e-38).nonzero().squeeze(1)
    if len(flat_rows):
        flat[flat_rows] = Draws(x[flat_rows], seed).normal(flat.shape[1]).to(flat.dtype)
    return torch.nn.functional.normalize(flat, dim=1).view_as(gradient)


def require_whole(name: str, value: object) -> None:
    """Raise `UserError` unless a hyper-parameter is a whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"attack.{name}={value}; expected a whole number, 0 or more")


def require_positive(name: str, value: float, *, below: float = float("inf")) -> None:
    """Raise `UserError` unless a hyper-parameter is above 0 and below the bound."""
    if not 0 < value < below:  # also NaN
        bound = "" if below == float("inf") else f" and below {below:g}"
        raise UserError(f"attack.{name}={value:g}; expected a number above 0{bound}")

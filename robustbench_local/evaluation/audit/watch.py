"""What an attack asks on its way, and what it could have known."""

from typing import Self

import torch
from torch import Tensor

from robustbench_local.gradients import attack_loss
from robustbench_local.oracle import Oracle
from robustbench_local.threat import TOLERANCE, ThreatModel
from robustbench_local.types import Images, Labels, Logits, Model, Norm

ORDERS: dict[Norm, float] = {"linf": torch.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}
"""The norms under which `Watch` knows whose a point is."""


class Watch(Oracle):
    """An oracle that remembers, for each of N images, the worst valid point it was asked about.

    Valid is what lies in the threat model around the image. Whose a point is say the `owners`; of a
    call about N points the order says it; else it is the image in whose ball alone the point lies,
    unless the attack `strays` outside the ball. Points that might be somebody else's do not count.
    `worst`, shape (N,), is the largest margin of a valid point (above 0 it is misclassified),
    `points` where the misclassified ones lie. With `paths` the margins are kept in order.
    """

    whole_batches = True  # parts of a batch would lose the order

    def __init__(
        self,
        victim: Model,
        threat: ThreatModel,
        num_classes: int,
        *,
        randomized: bool | None,
        x: Images,
        y: Labels,
        strays: bool,
        paths: bool,
    ) -> None:
        super().__init__(victim, threat, num_classes, randomized=randomized)
        self._x, self._y, self._strays, self._paths = x, y, strays, paths
        self.points = x.clone()
        self.worst = torch.full((len(x),), -torch.inf, device=x.device)
        self._calls: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, oracle: Oracle, x: Images, y: Labels, *, strays: bool, paths: bool) -> Self:
        """What another oracle grants, for a batch of images with their labels."""
        return cls(
            oracle.victim,
            oracle.threat,
            oracle.num_classes,
            randomized=oracle.randomized,
            x=x,
            y=y,
            strays=strays,
            paths=paths,
        )

    def forward(self, x: Images, owners: Tensor | None = None) -> Logits:
        """The victim's answer, noted."""
        logits = super().forward(x, owners)
        with torch.no_grad():
            self._note(x.detach(), logits.detach(), owners)
        return logits

    def path(self, row: int) -> Tensor:
        """The margins of the valid points asked about one image, in order."""
        found = [margins[rows == row] for rows, margins in self._calls]
        return torch.cat(found) if found else torch.zeros(0)

    def _note(self, x: Images, logits: Logits, owners: Tensor | None) -> None:
        rows = self._whose(x) if owners is None else owners.to(x.device)
        known = rows >= 0
        x, rows, logits = x[known], rows[known], logits[known]
        valid = (self.threat.size(x, self._x[rows]) <= self._limit) & (
            ((x >= -TOLERANCE) & (x <= 1 + TOLERANCE)).flatten(1).all(1)
        )
        x, rows, logits = x[valid], rows[valid], logits[valid]
        margins = attack_loss(logits, self._y[rows], "margin").float()
        if self._paths:
            self._calls.append((rows.cpu(), margins.cpu()))
        before = self.worst
        self.worst = before.scatter_reduce(0, rows, margins, "amax")
        news = (margins > before[rows]) & (margins == self.worst[rows]) & (margins > 0)
        self.points[rows[news]] = x[news]

    @property
    def _limit(self) -> float:
        return self.threat.epsilon + TOLERANCE * max(1.0, self.threat.epsilon)

    def _whose(self, x: Images) -> Tensor:
        """The row of the image that each point is about, -1 where that is not certain."""
        if len(x) == len(self._x):
            return torch.arange(len(x), device=x.device)
        if self._strays:
            return torch.full((len(x),), -1, device=x.device)
        points, images = x.flatten(1), self._x.flatten(1)
        exactly, order = "donot_use_mm_for_euclid_dist", ORDERS[self.threat.norm]
        sizes = torch.cdist(points, images, p=order, compute_mode=exactly)
        # cdist counts entries under l0, the threat model pixels: that many more are looked at.
        entries = self._x.shape[1] if order == 0 else 1
        near = sizes <= entries * self._limit + TOLERANCE
        return torch.where(near.sum(1) == 1, near.int().argmax(1), -1)

"""Every pixel in every colour of a grid: the exact answer that one-pixel searches are held to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.pixels import Scorer, paint
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm


@dataclass(frozen=True, kw_only=True)
class OnePixelExhaustive(Attack):
    """Looks at all images that differ in one pixel, its colour from a grid; for small images.

    `levels` values per channel at equal distances from 0 to 1, so an image with C channels costs
    height * width * levels**C forward passes. An image is broken if and only if some point of the
    grid breaks it; the most successful point comes back, of those that reach the goal if there are
    any. It changes one pixel whatever `threat.epsilon` is, and draws nothing.

    - `candidates`: images in one forward pass at most, or `None` for a number that suits the
      device. It bounds memory and changes no result.
    - `eot_samples`: forward passes averaged for each point. The best of so many noisy looks is a
      lucky one, so randomised victims need many.
    - `target`: the class to reach, see `attacks.target`.

    `threat.query_budget` cuts the grid off, extreme colours coming first: then the answer is no
    longer exact. Source: the exhaustive search of AESOP (2023, doi 10.3390/app13085092) on MNIST;
    the colour grid is ours.
    """

    needs: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l0"})

    levels: int = 5
    eot_samples: int = 1
    candidates: int | None = None
    target: Target = None

    def __post_init__(self) -> None:
        check_target(self.target)
        require_count("eot_samples", self.eot_samples)
        if self.candidates is not None:
            require_count("candidates", self.candidates)
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise UserError(
                f"attack.levels={self.levels}; expected a whole number from 2, so that 0 and 1 are "
                "among the values of a channel"
            )

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The grid block by block, each block for all examples."""
        y, targeted = self.goal(model, x, y)
        scorer = Scorer(
            model, x, y,
            targeted=targeted, at_once=self.candidates, samples=self.eot_samples,
        )  # fmt: skip
        colours, places = self.colours(x), x.shape[2] * x.shape[3]
        points = places * len(colours)
        if threat.query_budget is not None:
            points = min(points, (threat.query_budget - int(targeted)) // self.eot_samples)

        count = len(x)
        best, record = scorer.x.clone(), x.new_full((count,), -torch.inf)
        broken = torch.zeros(count, dtype=torch.bool, device=x.device)
        rows = torch.arange(count, device=x.device)
        step = -(-scorer.at_once // count)
        for start in range(0, points, step):
            block = torch.arange(start, min(start + step, points), device=x.device)
            place = (block % places).repeat(count)[:, None]
            colour = colours[block // places].repeat(count, 1)[:, None]
            answer = scorer(rows.repeat_interleave(len(block)), place, colour)
            score, reached = (values.view(count, -1) for values in answer)
            # A point that reaches the goal beats any that does not.
            some = reached.any(1)
            value, top = score.where(reached | ~some[:, None], -torch.inf).max(1)
            better = (some & ~broken) | ((some == broken) & (value > record))
            chosen = better.nonzero().squeeze(1)
            top = top[chosen] + chosen * len(block)
            best[chosen] = paint(scorer.x, chosen, place[top], colour[top])
            record[chosen], broken[chosen] = value[chosen], some[chosen]
        return best

    def colours(self, x: Images) -> Tensor:
        """The grid of colours, those with most channels at 0 or 1 first, (levels**C, C)."""
        values = torch.linspace(0, 1, self.levels, dtype=x.dtype, device=x.device)
        grid = torch.cartesian_prod(*[values] * x.shape[1]).view(-1, x.shape[1])
        inner = ((grid > 0) & (grid < 1)).sum(1)
        return grid[inner.argsort(stable=True)]

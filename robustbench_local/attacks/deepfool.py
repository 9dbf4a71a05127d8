"""DeepFool: step to the nearest face of the linearised decision region, until outside it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.attacks.base import require_count
from robustbench_local.attacks.minimum_norm import MinimumNorm, Nearest, require_positive
from robustbench_local.errors import UserError
from robustbench_local.rejection import class_scores, folded
from robustbench_local.types import Images, Logits, Model, Norm


@dataclass(frozen=True, kw_only=True)
class DeepFool(MinimumNorm):
    """DeepFool (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599) for l2 and linf.

    Each step goes to the nearest of the boundaries with other classes, as their gradients at this
    point have it. Images that reached the goal leave the batch.

    - `steps` at most. `overshoot`: the sum of all steps is lengthened by this share.
    - `candidates`: how many wrong classes are considered, those of the highest scores at the image;
      each costs a backward pass per step.
    - `eot_samples`, `boundary_steps`, `target`: see `PGD`, `MinimumNorm` and `attacks.target`; with
      a target the boundary between it and the highest other score is approached.

    Deviations from the paper: each step is directed inside the box, where the paper's would be cut
    off at pixels 0 and 1 and stall. Until a tenth of the first gap in scores is left it has the
    paper's length, or half of what the box asks for if that is more, since linear approximations
    hold nearby only. All classes up to 10 are considered by default, and `boundary_steps` takes
    most of the overshoot back.
    """

    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 9
    eot_samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "candidates", "eot_samples"):
            require_count(name, getattr(self, name))
        require_positive("overshoot", self.overshoot)

    def search(self, held: Nearest) -> None:
        """Walk all images at once, each until it reaches the goal."""
        rows = torch.arange(len(held.x), device=held.x.device)
        with torch.no_grad():
            wanted = self._wanted(held, held.model(held.x))
        total = torch.zeros_like(held.x)
        x_adv = held.x
        first = held.size.new_zeros(len(rows))
        for _ in range(self.steps):
            step, gap = self._step(held, rows, x_adv, wanted, first)
            first = torch.where(first > 0, first, gap)
            total = total + step
            x_adv = (held.x[rows] + (1 + self.overshoot) * total).clamp(0, 1)
            going = (~held.offer(x_adv, held.fools(x_adv, rows), rows)).nonzero().squeeze(1)
            if len(going) == 0:
                return
            if len(going) < len(rows):
                rows, x_adv, wanted = rows[going], x_adv[going], wanted[going]
                total, first = total[going], first[going]

    def _wanted(self, held: Nearest, logits: Logits) -> Tensor:
        """The classes each image may go to, shape (N, candidates)."""
        if held.targeted:
            return held.y[:, None]
        logits = class_scores(logits)
        wrong = logits.scatter(1, held.y[:, None], -torch.inf)
        return wrong.topk(min(self.candidates, logits.shape[1] - 1), dim=1).indices

    def _step(
        self, held: Nearest, rows: Tensor, x_adv: Images, wanted: Tensor, first: Tensor
    ) -> tuple[Images, Tensor]:
        """The shortest of the steps to the classes wanted; the most useful where none arrives.

        Also how far the nearest class lies behind in scores; `first` is that of the first step.
        """
        y = held.y[rows]
        gaps, slopes = _boundaries(
            held.model, x_adv, y, wanted, targeted=held.targeted, samples=self.eot_samples
        )
        behind = torch.stack(gaps).amin(0)
        near = behind < 0.1 * first
        linf = held.threat.norm == "linf"
        best = torch.zeros_like(x_adv)
        length = torch.full_like(gaps[0], torch.inf)
        lack = torch.full_like(gaps[0], torch.inf)
        for gap, slope in zip(gaps, slopes, strict=True):
            step, missing = _shortest(gap, slope.flatten(1), x_adv.flatten(1), linf=linf)
            size = step.abs().amax(1) if linf else step.norm(dim=1)
            # Whether it arrives decides before its length: outside the box no step is of use.
            better = (missing < lack) | ((missing == lack) & (size < length))
            better &= (slope != 0).flatten(1).any(1)
            slant = slope.flatten(1).norm(p=1 if linf else 2, dim=1)
            share = gap / (slant * size).clamp(min=1e-30)  # of the length without a box
            step = step * share.clamp(min=0.5, max=1).masked_fill(near, 1)[:, None]
            best = torch.where(better.view(-1, 1, 1, 1), step.view_as(best), best)
            length, lack = torch.where(better, size, length), torch.where(better, missing, lack)
        return best, behind


def _boundaries(
    model: Model, x: Images, y: Tensor, wanted: Tensor, *, targeted: bool, samples: int
) -> tuple[list[Tensor], list[Tensor]]:
    """How far each wanted class's score lies below the one to beat, and the gradient of that.

    The one to beat is that of the true class or, if `targeted`, the highest other one, in either
    case that of rejection too.
    """
    x = x.detach().requires_grad_()
    gaps: list[Tensor] = []
    slopes: list[Tensor] = []
    with torch.enable_grad():
        logits = torch.stack([model(x) for _ in range(samples)]).mean(0)
        logits = logits if targeted else folded(logits, y)
        hold = logits.scatter(1, y[:, None], -torch.inf).argmax(1) if targeted else y
        held = logits.gather(1, hold[:, None])
        ahead = logits.gather(1, wanted) - held  # (N, candidates), negative
        for place in range(wanted.shape[1]):
            last = place == wanted.shape[1] - 1
            (slope,) = torch.autograd.grad(ahead[:, place].sum(), x, retain_graph=not last)
            gaps.append(ahead[:, place].detach().clamp(max=0).neg())
            slopes.append(slope)
    if any(bool(slope.isnan().any()) for slope in slopes):
        raise UserError(
            "the input gradient is NaN; expected finite numbers: give the part of the model that "
            "has no gradient a surrogate (BPDA)"
        )
    return gaps, slopes


def _shortest(gap: Tensor, slope: Tensor, x: Tensor, *, linf: bool) -> tuple[Tensor, Tensor]:
    """The shortest step within the box whose `slope` makes up for `gap`, and what is still missing.

    `gap` (N,), `slope` and `x` (N, D). The optimum moves every entry in proportion to its slope
    (l2) or equally (linf), up to the room it has. Those that their room holds back only grow in
    number, so solving for the common factor and enlarging the set ends, exactly.
    """
    steep = slope.abs()
    scale = steep.amax(1, keepdim=True).clamp(min=1e-38)
    steep = steep / scale
    gap = (gap[:, None] / scale).to(x.dtype).clamp(min=1e-5)  # a tie needs a push too
    room = torch.where(slope > 0, 1 - x, x)
    pace = (steep > 0).to(x.dtype) if linf else steep
    stuck = torch.zeros_like(steep, dtype=torch.bool)
    while True:
        done = (steep * room).masked_fill(~stuck, 0).sum(1, keepdim=True)
        rate = (steep * pace).masked_fill(stuck, 0).sum(1, keepdim=True)
        factor = (gap - done).clamp(min=0) / rate.clamp(min=1e-30)
        more = (factor * pace > room) & ~stuck
        if not more.any():
            break
        stuck |= more
    step = torch.minimum(factor * pace, room)
    missing = (gap - (step * steep).sum(1, keepdim=True)).squeeze(1)
    # Rounding leaves crumbs, that may not decide between boundaries that are all within reach.
    missing = torch.where(missing > 1e-4 * gap.squeeze(1), missing * scale.squeeze(1), 0)
    return slope.sign() * step, missing

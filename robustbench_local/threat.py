"""What the adversary may do. The only owner of epsilon."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Self, get_args

import torch
from torch import Tensor

from robustbench_local import spatial
from robustbench_local.errors import FoulError, UserError
from robustbench_local.randomness import Draws
from robustbench_local.types import Access, Images, Norm

TOLERANCE = 1e-6
"""How far rounding may carry an example out of the budget or the box before it is an error."""

_ACCESS = get_args(Access)
_NORMS = get_args(Norm)


def parse_epsilon(value: object) -> float:
    """Read a radius such as `0.3` or `8/255` (`Fraction`, no `eval`).

    Raises `UserError` for anything else.
    """
    try:
        return float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(
            f"threat.epsilon={value!r} is not a number; expected a radius in pixel units, "
            "type for example threat.epsilon=8/255 or threat.epsilon=0.3"
        ) from None


def check_box(x: Images) -> None:
    """Raise `UserError` for pixels outside [0, 1] or NaN."""
    if x.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    if not 0 <= low <= high <= 1:  # also false for NaN
        raise UserError(
            f"images hold pixels from {low:g} to {high:g}; expected float32 in [0, 1]: divide by "
            "255 and leave normalisation to the model's first layer"
        )


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """The set of perturbed images an attack may return, and what it may ask the victim.

    `epsilon` is the radius in pixel units (pixels in [0, 1]); for l0 the number of pixels, for
    spatial the share of the largest rotation and translation, see `robustbench_local.spatial`.
    Strings such as "8/255" are read. `query_budget` is the number of forward passes per example,
    `None` for no limit. Raises `UserError` for a radius that is negative, not a number, or above 1
    for linf and spatial.

    `per_example` makes one for a batch in which every image has a radius of its own, so that a
    whole curve is attacked at once; `epsilon` is then the largest of them, and `threat[rows]` goes
    with `x[rows]`.
    """

    norm: Norm
    epsilon: float
    access: Access = "gradients"
    query_budget: int | None = None
    radii: Tensor | None = field(default=None, repr=False, compare=False)  # (N,), or one for all

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", parse_epsilon(self.epsilon))
        if self.norm not in _NORMS:
            raise UserError(
                f"threat.norm={self.norm} is unknown; expected one of {', '.join(_NORMS)}"
            )
        if self.access not in _ACCESS:
            raise UserError(
                f"threat.access={self.access} is unknown; expected one of {', '.join(_ACCESS)}"
            )
        if self.epsilon < 0:
            raise UserError(
                f"threat.epsilon={self.epsilon:g} is negative; expected a radius of 0 or more in "
                "pixel units, type for example threat.epsilon=8/255"
            )
        if self.norm == "linf" and self.epsilon > 1:
            raise UserError(
                f"threat.epsilon={self.epsilon:g} is above 1, but pixels lie in [0, 1]; "
                f"type threat.epsilon={self.epsilon:g}/255 if the radius is on the 0-255 scale"
            )
        if self.norm == "spatial" and self.epsilon > 1:
            raise UserError(
                f"threat.epsilon={self.epsilon:g} is above 1, but under spatial it is the share of "
                "the ranges (30 degrees, 10% of each side); type for example threat.epsilon=1"
            )
        if self.norm == "l0" and self.epsilon != int(self.epsilon):
            raise UserError(
                f"threat.epsilon={self.epsilon:g} is not whole, but under l0 it is the number of "
                "pixels; type for example threat.epsilon=1"
            )
        budget = self.query_budget
        whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
        if budget is not None and not whole:
            raise UserError(
                f"threat.query_budget={budget}; expected a whole number of forward passes, 1 or "
                "more, type threat.query_budget=null for no limit"
            )

    def per_example(self, radii: Tensor) -> Self:
        """The same adversary with a radius for each example of a batch, shape (N,)."""
        largest = float(radii.max()) if len(radii) else 0.0
        return replace(self, epsilon=largest, radii=radii)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """What holds for some examples of the batch; the same object where all share one radius."""
        return self if self.radii is None else replace(self, radii=self.radii[rows])

    def check_fits(self, input_shape: Sequence[int]) -> None:
        """Raise `UserError` where l0 allows more pixels than images of (C, H, W) have."""
        height, width = input_shape[-2:]
        if self.norm == "l0" and self.epsilon > height * width:
            raise UserError(
                f"threat.epsilon={self.epsilon:g} pixels may change under l0 and the images have "
                f"{height * width} ({height}x{width}); expected 1 to {height * width}, type for "
                "example threat.epsilon=1"
            )

    def radius(self, x: Images, share: float = 1.0) -> Tensor:
        """This share of epsilon in the type of `x`, of shape (N, 1, 1, 1) or (1, 1, 1, 1)."""
        if self.radii is None:
            return x.new_full((1, 1, 1, 1), share * self.epsilon)
        return (share * self.radii.double()).to(x).view(-1, 1, 1, 1)

    def allows(self, needs: Access) -> bool:
        """Whether this adversary may use an attack that needs this access."""
        return _ACCESS.index(needs) >= _ACCESS.index(self.access)

    def size(self, x_adv: Images, x: Images) -> Tensor:
        """How large each perturbation is under the norm, float64, shape (N,)."""
        if self.norm == "spatial":
            return spatial.size(x_adv, x)
        delta = (x_adv.detach().double() - x.detach().double()).abs()
        if self.norm == "l0":
            return (delta > 0).any(1).flatten(1).sum(1).double()
        delta = delta.flatten(1)
        if self.norm == "linf":
            return delta.amax(1)
        sizes: Tensor = torch.linalg.vector_norm(delta, ord=2 if self.norm == "l2" else 1, dim=1)
        return sizes

    def project(self, x_adv: Images, x: Images) -> Images:
        """The nearest image (Euclidean) inside both the ball around `x` and the box [0, 1].

        For l1 and l2 it is the exact projection on the intersection (Croce and Hein 2021,
        arXiv:2103.01208): clipping after projecting would leave budget unused. For l0 the pixels
        that bring the image nearest are kept; for spatial there is no such image.
        """
        return self.project_into(self.ball(x), x_adv)

    def ball(self, x: Images) -> tuple[Images, ...]:
        """What many projections around the same images have in common, for `project_into`.

        Each part has a row for every image: lowest and highest pixels under linf, else `x` itself.
        """
        if self.norm != "linf":
            return (x,)
        epsilon = self.epsilon if self.radii is None else self.radius(x)
        return (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)

    def project_into(self, ball: tuple[Images, ...], x_adv: Images) -> Images:
        """As `project`, around the images whose `ball` it is."""
        self._need_a_ball("project")
        if self.norm == "linf":
            return torch.clamp(x_adv, *ball)  # one pass
        (x,) = ball
        boxed = x_adv.clamp(0, 1)
        if self.norm == "l0":
            return self._keep_largest(x_adv, boxed, x)
        outside = self.size(boxed, x) > self.limits(x)
        if not outside.any():
            return boxed
        start, wanted = x[outside], x_adv[outside]
        limits = self[outside].limits(start)[:, None]  # (N, 1), float64
        delta = (wanted - start).flatten(1)
        room = torch.where(delta > 0, 1 - start.flatten(1), start.flatten(1))
        shrink = _shrink_l2 if self.norm == "l2" else _shrink_l1
        magnitude = shrink(delta.abs(), room, limits)
        inside = (start + (delta.sign() * magnitude).view_as(start)).clamp_(0, 1)
        # Adding to x rounds; what that carried out of the ball is drawn back by as much.
        for _ in range(2):
            ratio = limits[:, 0] / self.size(inside, start).clamp(min=1e-30)
            ratio = torch.where(ratio < 1, ratio - 1e-7, 1.0).to(x.dtype).clamp_(min=0)
            inside = start + (inside - start) * ratio.view(-1, 1, 1, 1)
        boxed[outside] = inside
        return boxed

    def limits(self, x: Images) -> Tensor:
        """Epsilon of every example, float64, shape (N,)."""
        if self.radii is None:
            return torch.full((len(x),), self.epsilon, device=x.device, dtype=torch.float64)
        return self.radii.to(x.device, torch.float64)

    def _keep_largest(self, wanted: Images, boxed: Images, x: Images) -> Images:
        # How much nearer to `wanted` each pixel comes by being changed, (N, H*W).
        gain = ((wanted - x).square() - (wanted - boxed).square()).sum(1).flatten(1)
        return torch.where(self._most(gain, x), boxed, x)

    def _most(self, gain: Tensor, x: Images) -> Tensor:
        """The `epsilon` pixels of highest gain of every example, bool (N, 1, H, W)."""
        rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        most: Tensor = (rank < self.limits(x)[:, None]).view(x.shape[0], 1, *x.shape[2:])
        return most

    def random_start(self, x: Images, draws: Draws) -> Images:
        """A uniformly drawn point of the ball around `x`, then projected into the box too.

        For spatial an element of the grid.
        """
        if self.norm == "spatial":
            return self._random_transform(x, draws)
        pixels = x[0].numel()
        epsilon = self.limits(x)[:, None].float()
        if self.norm == "linf":
            delta = draws.uniform(pixels).mul_(2).sub_(1).mul_(epsilon)
        elif self.norm == "l2":
            delta = draws.normal(pixels)
            radius = draws.uniform(1) ** (1 / pixels) * epsilon
            delta *= radius / delta.norm(dim=1, keepdim=True)
        elif self.norm == "l1":
            # Exponential magnitudes divided by their sum and one more: uniform in the simplex.
            magnitude = -draws.uniform(pixels).log()
            total = magnitude.sum(1, keepdim=True) - draws.uniform(1).log()
            delta = magnitude / total * (draws.uniform(pixels) - 0.5).sign() * epsilon
        else:
            return self._random_pixels(x, draws)
        return self.project(x + delta.view_as(x).to(x.dtype), x)

    def _random_pixels(self, x: Images, draws: Draws) -> Images:
        places = x[0, 0].numel()
        colour = draws.uniform(x[0].numel()).view_as(x).to(x.dtype)
        return torch.where(self._most(draws.uniform(places), x), colour, x)

    def _random_transform(self, x: Images, draws: Draws) -> Images:
        result, drawn = x.clone(), draws.uniform(1).squeeze(1).double()
        limits = self.limits(x)
        for limit in sorted(set(limits.tolist())):
            inside = spatial.grid(limit)
            rows = (limits == limit).nonzero().squeeze(1)
            choice = (drawn[rows] * len(inside)).long()
            for place in sorted(set(choice.tolist())) if inside else []:
                chosen = rows[choice == place]
                result[chosen] = spatial.apply(x[chosen], inside[place])
        return result

    def _need_a_ball(self, what: str) -> None:
        if self.norm == "spatial":
            raise UserError(
                f"threat.norm=spatial has no {what}: it is a set of rotations and translations and "
                "no ball; type attack=spatial, or choose another norm"
            )

    def direction(
        self, gradient: Tensor, x_adv: Images, length: Tensor | float, *, progress: float = 0.0
    ) -> Tensor:
        """The step of unit size along which the loss rises most; 0 where the gradient is 0.

        linf: the sign; l2: the normalised gradient. l1: a step of this `length` (one for all, or of
        shape (N, 1, 1, 1)) goes to the entries with the largest gradient, in order, each taking an
        equal share and no more than the box leaves it. The share is that of 1% of the entries
        (Tramer and Boneh 2019, arXiv:1904.13000) and grows to the whole step over the last 40% of
        the attack, at `progress` 0.6 to 1, since equal shares alone stop short of the best point
        (cf. Croce and Hein 2021, arXiv:2103.01208).
        """
        self._need_a_ball("direction")
        if self.norm == "linf":
            return gradient.sign()
        flat = gradient.flatten(1)
        if self.norm == "l2":
            # Scaled first: squares of tiny float32 gradients would underflow.
            flat = flat / flat.abs().amax(1, keepdim=True).clamp_(min=1e-38)
            return torch.nn.functional.normalize(flat, dim=1).view_as(gradient)
        if self.norm != "l1":
            raise UserError("a gradient step is not defined under l0; choose an l0 attack")
        room = (torch.where(gradient > 0, 1 - x_adv, x_adv) / length).flatten(1).clamp(min=0)
        entries = round(max(1.0, flat.shape[1] / 100) ** min(1.0, (1 - progress) / 0.4))
        share = room.clamp_(max=1 / entries)
        share = share.masked_fill_(flat == 0, 0)
        order = flat.abs().argsort(dim=1, descending=True)
        share = share.gather(1, order)
        left = 1 - (share.cumsum(1) - share)  # before each entry, in order
        share = torch.minimum(share, left.clamp_(min=0))
        return torch.zeros_like(flat).scatter_(1, order, share).mul_(flat.sign()).view_as(gradient)

    def check(self, x_adv: Images, x: Images) -> None:
        """Raise `BudgetError` for the first image outside the ball or the box, or not a number."""
        if x_adv.shape != x.shape:
            raise BudgetError(
                f"the attack returned shape {tuple(x_adv.shape)}; expected {tuple(x.shape)}"
            )
        finite = torch.isfinite(x_adv).flatten(1).all(1)
        if not finite.all():
            raise BudgetError("the attack returned NaN or infinity", image=_first(~finite))
        excess = torch.maximum(-x_adv, x_adv - 1).flatten(1).amax(1)
        if (excess > TOLERANCE).any():
            image = _first(excess > TOLERANCE)
            values = x_adv[image]
            raise BudgetError(
                f"pixels from {values.min():.7g} to {values.max():.7g} leave [0, 1]", image=image
            )
        size = self.size(x_adv, x)
        limits = self.limits(x)
        outside = size > limits + TOLERANCE * limits.clamp(min=1)
        if outside.any():
            image = _first(outside)
            raise BudgetError(
                f"a perturbation of {self.norm} size {size[image]:.7g} exceeds epsilon "
                f"{limits[image]:.7g}",
                image=image,
            )


class BudgetError(FoulError):
    """An attack returned something outside its threat model: a defect of the attack.

    `image` is the position of the first such image in the batch, `reason` the rest of the message.
    """

    def __init__(self, reason: str, *, image: int | None = None) -> None:
        super().__init__(reason if image is None else f"image {image}: {reason}")
        self.reason = reason
        self.image = image


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0, 0])


def _shrink_l2(magnitude: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """min(s * magnitude, room) with the largest s in [0, 1] that keeps the l2 norm at `radius`.

    `radius` has shape (N, 1).

    The set of entries that their room holds back only grows as s grows, so solving for s with the
    set fixed and enlarging it ends after finitely many turns, exactly.
    """
    radius = radius.to(magnitude.dtype)
    held = torch.zeros_like(magnitude, dtype=torch.bool)
    while True:
        free = magnitude.masked_fill(held, 0).square().sum(1, keepdim=True)
        spent = room.masked_fill(~held, 0).square().sum(1, keepdim=True)
        scale = ((radius**2 - spent).clamp_(min=0) / free.clamp(min=1e-30)).sqrt_().clamp_(max=1)
        more = (scale * magnitude > room) & ~held
        if not more.any():
            return torch.minimum(scale * magnitude, room)
        held |= more


def _shrink_l1(magnitude: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """clip(magnitude - cut, 0, room) with the smallest cut >= 0 that keeps the sum at `radius`.

    The sum falls piecewise linearly in the cut: entry i stays at `room` until `magnitude - room`,
    then falls with slope one until `magnitude`. Sorting those points finds the piece exactly.
    """
    magnitude, room = magnitude.double(), room.double()
    leaves = (magnitude - room).clamp_(min=0)  # where an entry begins to fall; 0: from the start
    points = torch.cat((leaves, magnitude), 1)
    slopes = torch.cat((-torch.ones_like(leaves), torch.ones_like(magnitude)), 1)
    points, order = points.sort(1)
    slopes = slopes.gather(1, order).cumsum(1)  # the slope right of each point
    start = torch.minimum(magnitude, room).sum(1, keepdim=True)
    steps = slopes[:, :-1] * points.diff(dim=1)
    totals = torch.cat((start, start + steps.cumsum(1)), 1)  # the sum when cut is at each point
    last = (totals > radius).sum(1, keepdim=True).sub_(1).clamp_(min=0)
    slope = slopes.gather(1, last).clamp_(max=-1e-12)
    cut = points.gather(1, last) + (radius - totals.gather(1, last)) / slope
    cut.clamp_(min=0)
    return torch.minimum((magnitude - cut).clamp_(min=0), room).float()

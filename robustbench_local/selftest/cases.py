"""The victims an attack meets, with images of known difficulty."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustbench_local.attacks import Attack, Noise
from robustbench_local.selftest.images import Kind, images_of, linear_victim
from robustbench_local.selftest.optimum import worst_case
from robustbench_local.selftest.victims import DeclaredNoise, LinearVictim, Masked, Ridge
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels

GREY, COLOUR = (1, 8, 8), (3, 8, 8)
_RIDGES = 12

DRAWS = 20
"""Looks of the judge at a random victim, and draws an attack averages of it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A victim, images it gets right (unless it says otherwise), and which of them can be broken.

    `needed` (N,) is the share of the best perturbation that breaks an image, above 1 where none
    does. `random` victims are judged on several draws; a `masked` one gives no gradient; of one
    with a `path` nothing may be lost on the way.
    """

    name: str
    victim: nn.Module
    classes: int
    x: Images
    y: Labels
    needed: Tensor
    random: bool = False
    masked: bool = False
    path: bool = False

    @property
    def known(self) -> str:
        """The truth in a few words."""
        wrong = int((self.needed <= 0).sum())
        breakable = int(((self.needed > 0) & (self.needed < 1)).sum())
        told = f"{breakable} of {len(self.x)} can be broken"
        return f"{told}, {wrong} wrong before" if wrong else told


def ambition(attack: Attack, threat: ThreatModel, classes: int) -> float:
    """The share of the best perturbation that the attack has to reach on a linear victim.

    0 demands no more than what random noise breaks. With two classes gradients reach the optimum;
    with more the best class is not always the one that is nearest at first, and an attack that
    climbs towards another stays there. One gradient step is the optimum under linf alone: under l2
    the box takes a part of it, and under l1 it changes few entries. What sees labels only is not
    held to an optimum, but for the grid of spatial, of which any element is one question.
    """
    norm = threat.norm
    if norm == "spatial":
        return 0.0 if isinstance(attack, Noise) else 0.99
    if attack.needs == "labels":
        return 0.0
    if attack.needs == "scores":
        return {"linf": 0.8, "l0": 0.8}.get(norm, 0.5)
    if getattr(attack, "steps", None) == 1:
        return {"linf": 0.97 if classes == 2 else 0.7, "l2": 0.7}.get(norm, 0.0)
    return 0.97 if classes == 2 and norm in ("linf", "l2") else 0.8


def cases(attack: Attack, threat: ThreatModel) -> Iterator[Case]:
    """Every victim on which the attack is measured against what is known."""
    yield _linear("linear, 2 classes", attack, threat, GREY, 2)
    yield _linear("linear, 5 classes, 3 channels", attack, threat, COLOUR, 5)
    yield _linear("pixels at 0 and 1, 3 classes", attack, threat, GREY, 3, kind="at the edge")
    yield _linear("logits shifted by -50", attack, threat, COLOUR, 4, shift=-50)
    yield _linear("logits times 1000", attack, threat, GREY, 3, scale=1000)
    plain = _linear("", attack, threat, GREY, 2)
    yield _some_wrong(_linear("some images wrong before", attack, threat, GREY, 4))
    yield _masked(plain)
    yield _noisy(plain, attack, threat)
    if threat.norm != "spatial":  # where images are as hard as they come
        yield _undecided(threat)
        yield _ridge(threat)


def _linear(
    name: str,
    attack: Attack,
    threat: ThreatModel,
    shape: Sequence[int],
    classes: int,
    *,
    kind: Kind = "between",
    shift: float = 0,
    scale: float = 1,
) -> Case:
    victim = linear_victim(shape, classes)
    victim = LinearVictim(victim.weight.detach(), victim.bias.detach(), shift=shift, scale=scale)
    most = ambition(attack, threat, classes) or 0.5
    shares = torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64) * (most - 0.01)
    wanted = torch.cat([shares.repeat(4), torch.tensor([1.05, 1.3], dtype=torch.float64).repeat(2)])
    x, y = images_of(victim, shape, threat, wanted, kind)
    needed = worst_case(victim, x, y, threat).needed
    return Case(name=name, victim=victim, classes=classes, x=x, y=y, needed=needed)


def _undecided(threat: ThreatModel) -> Case:
    """So near to the boundary that random points of the budget are enough: the floor."""
    victim = linear_victim(GREY, 2)
    wanted = torch.full((16,), 0.02, dtype=torch.float64)
    x, y = images_of(victim, GREY, threat, wanted, "between")
    needed = worst_case(victim, x, y, threat).needed
    return Case(name="nearly undecided", victim=victim, classes=2, x=x, y=y, needed=needed)


def _some_wrong(case: Case) -> Case:
    """Every fourth image gets another label: wrong before anything was attacked."""
    y = case.y.clone()
    y[::4] = (y[::4] + 1) % case.classes
    needed = case.needed.clone()
    needed[::4] = 0
    return replace(case, y=y, needed=needed)


def _masked(case: Case) -> Case:
    return replace(
        case, name="rounded pixels, no gradient", victim=Masked(case.victim, 16), masked=True
    )


def _noisy(case: Case, attack: Attack, threat: ThreatModel) -> Case:
    """Noise on the pixels that turns an image in one of fifty draws at most.

    Only the images that stay far from the boundary, attacked or not, are kept.
    """
    assert isinstance(case.victim, LinearVictim)
    weight = case.victim.weight.detach()
    slope = weight[1 - case.y] - weight[case.y]
    point = worst_case(case.victim, case.x, case.y, threat).point
    rise = (slope * (point - case.x).flatten(1).double()).sum(1)
    deviation = float((0.1 * rise / slope.norm(dim=1)).min()) / 2
    most = ambition(attack, threat, 2)
    keep = (case.needed < most - 0.12) | (case.needed > 1.12) if most else case.needed > 0
    return replace(
        case,
        name="noise on every pixel",
        victim=DeclaredNoise(case.victim, deviation),
        random=True,
        x=case.x[keep],
        y=case.y[keep],
        needed=case.needed[keep],
    )


def _ridge(threat: ThreatModel) -> Case:
    """Class 0 but on a narrow ridge, 15% to 85% of the budget away from the images.

    The distances are so near to each other that whatever the gait of an attack, it steps on some
    of the ridges on its way and across others.
    """
    victim = linear_victim(GREY, 2)
    direction = (victim.weight[1] - victim.weight[0]).detach()
    generator = torch.Generator().manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(_RIDGES, *GREY, generator=generator)
    y = torch.zeros(_RIDGES, dtype=torch.int64)
    flat = LinearVictim(torch.stack([torch.zeros_like(direction), direction]), torch.zeros(2))
    rise = (worst_case(flat, x, y, threat).point - x).flatten(1).double() @ direction
    height = float((x.flatten(1).double() @ direction + 0.5 * rise).mean())
    away = torch.linspace(0.15, 0.85, _RIDGES, dtype=torch.float64)
    excess = x.flatten(1).double() @ direction - (height - away * rise)
    x = x - ((excess / direction.square().sum())[:, None] * direction).view_as(x).float()
    return Case(
        name="a narrow ridge",
        victim=Ridge(direction, height, 0.5 * float(rise.mean()) * 0.7 / (_RIDGES - 1) + 1e-6),
        classes=2,
        x=x.clamp(0, 1),
        y=y,
        needed=away,
        path=True,
    )

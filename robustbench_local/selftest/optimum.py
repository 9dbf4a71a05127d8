"""The strongest perturbation of a linear victim, exactly, under every norm and inside the box."""

from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_local import spatial
from robustbench_local.selftest.victims import LinearVictim
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels


class Worst(NamedTuple):
    """What the strongest perturbation of each image is, and how much of it would do."""

    point: Images
    needed: Tensor  # (N,) float64, share of its rise that turns the prediction; above 1: none does


def worst_case(victim: LinearVictim, x: Images, y: Labels, threat: ThreatModel) -> Worst:
    """The perturbation towards the wrong class that is easiest to reach.

    `needed` is the margin of the true class divided by what the best perturbation takes off it,
    the least over the wrong classes. It is 0 or below where the image is wrong from the start.
    """
    weight, bias = victim.weight.detach().to(x.device), victim.bias.detach().to(x.device)
    flat = x.flatten(1).double()
    never = torch.full((len(x),), torch.inf, device=x.device, dtype=torch.float64)
    best = Worst(x.clone(), never)
    logits = flat @ weight.T + bias
    for wrong in range(len(bias)):
        slope = weight[wrong] - weight[y]  # (N, D)
        margin = logits.gather(1, y[:, None]).squeeze(1) - logits[:, wrong]
        point = highest(slope, x, threat)
        rise = (slope * (point.flatten(1).double() - flat)).sum(1)
        needed = (margin / rise.clamp(min=1e-12)).masked_fill(y == wrong, torch.inf)
        nearer = needed < best.needed
        best = Worst(
            torch.where(nearer.view(-1, 1, 1, 1), point, best.point),
            torch.where(nearer, needed, best.needed),
        )
    return best


def highest(slope: Tensor, x: Images, threat: ThreatModel) -> Images:
    """Where `slope` (N, D) @ pixels is largest inside ball and box.

    linf: every pixel for itself. l1: a fractional knapsack, so the steepest pixels are filled
    first. l2: clip(t * slope, room) for the t that spends epsilon. l0: the pixels that gain most,
    each at its best colour. spatial: the best element of the grid.
    """
    if threat.norm == "spatial":
        return _best_transform(slope, x, threat)
    flat = x.flatten(1).double()
    room = torch.where(slope > 0, 1 - flat, flat)
    steep, epsilon = slope.abs(), threat.epsilon
    if threat.norm == "linf":
        move = room.clamp(max=epsilon)
    elif threat.norm == "l2":
        move = _fill_l2(steep, room, epsilon)
    elif threat.norm == "l1":
        order = steep.argsort(dim=1, descending=True)
        filled = room.gather(1, order).cumsum(1).clamp(max=epsilon)
        taken = filled.diff(dim=1, prepend=torch.zeros_like(filled[:, :1]))
        move = torch.zeros_like(room).scatter(1, order, taken)
    else:
        gain = (steep * room).view(len(x), x.shape[1], -1).sum(1)
        chosen = torch.zeros_like(gain).scatter(1, gain.topk(int(epsilon), dim=1).indices, 1)
        move = room * chosen.repeat(1, x.shape[1])
    return (flat + slope.sign() * move).view_as(x).to(x.dtype).clamp(0, 1)


def _fill_l2(steep: Tensor, room: Tensor, epsilon: float) -> Tensor:
    low, high = torch.zeros_like(steep[:, :1]), torch.full_like(steep[:, :1], 1e6)
    for _ in range(60):
        middle = (low + high) / 2
        inside = torch.minimum(middle * steep, room).norm(dim=1, keepdim=True) <= epsilon
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.minimum(low * steep, room)


def _best_transform(slope: Tensor, x: Images, threat: ThreatModel) -> Images:
    best, most = x.clone(), torch.zeros(len(x), device=x.device, dtype=torch.float64)
    for place in spatial.grid(threat.epsilon):
        moved = spatial.apply(x, place)
        rise = (slope * (moved - x).flatten(1).double()).sum(1)
        better = rise > most
        most = torch.where(better, rise, most)
        best = torch.where(better.view(-1, 1, 1, 1), moved, best)
    return best

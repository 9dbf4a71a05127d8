"""Images on which a linear victim is exactly as hard to fool as wanted."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from robustbench_local.randomness import derive_seed
from robustbench_local.selftest.optimum import worst_case
from robustbench_local.selftest.victims import LinearVictim
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels

Kind: TypeAlias = Literal["between", "at the edge"]
"""Pixels well inside [0, 1], or most of them exactly 0 or 1."""

_TRIES = 6


def linear_victim(shape: Sequence[int], classes: int) -> LinearVictim:
    """Random weights for images of (C, H, W), the mean image being undecided."""
    generator = torch.Generator().manual_seed(derive_seed("weights", *shape, classes))
    pixels = int(torch.tensor(shape).prod())
    weight = torch.randn(classes, pixels, generator=generator)
    return LinearVictim(weight, -weight.sum(1) / 2)


def images_of(
    victim: LinearVictim,
    shape: Sequence[int],
    threat: ThreatModel,
    needed: Tensor,
    kind: Kind,
) -> tuple[Images, Labels]:
    """One image for each entry of `needed`, see `optimum.Worst`: right, and that hard to fool.

    Each starts at random and is brought towards its class, or away from it, until it is as hard as
    wanted. Where the budget is so large that no image is that hard, it is the hardest found on the
    way. Of several it is the one of which it is clearest what class it can be turned into. Under
    spatial, where looking is dear, images are as hard as they come.
    """
    generator = torch.Generator().manual_seed(derive_seed("images", *shape, kind))
    tries = 1 if threat.norm == "spatial" else _TRIES
    y = (torch.arange(len(needed)) % len(victim.bias)).repeat(tries)
    path = _Path(victim, shape, y, kind, generator)
    if threat.norm == "spatial":
        return path.at(torch.linspace(0.1, 0.9, len(y))), y
    wanted = needed.repeat(tries)
    low, high = torch.full((len(y),), -1.0), torch.ones(len(y))
    for _ in range(40):
        middle = (low + high) / 2
        short = worst_case(victim, path.at(middle), y, threat).needed < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    # Just short of what is wanted, or just above it where no perturbation may do.
    x = torch.where((wanted > 1).view(-1, 1, 1, 1), path.at(high), path.at(low))
    best = _lead(victim, x, y).view(tries, -1).argmax(0) * len(needed) + torch.arange(len(needed))
    return x[best], y[best]


def _lead(victim: LinearVictim, x: Images, y: Labels) -> Tensor:
    """How far the strongest wrong class is ahead of the next one, (N,); 0 where there is none."""
    with torch.no_grad():
        logits: Tensor = victim(x).scatter(1, y[:, None], -torch.inf)
    ahead = logits.sort(dim=1, descending=True).values
    return ahead[:, 0] - ahead[:, 1] if logits.shape[1] > 2 else torch.zeros(len(x))


class _Path:
    """From a random image (0) to one that is as clearly of its class as can be (1), or not (-1)."""

    def __init__(
        self,
        victim: LinearVictim,
        shape: Sequence[int],
        y: Labels,
        kind: Kind,
        generator: torch.Generator,
    ) -> None:
        weight = victim.weight.detach().float()
        self._towards = (weight[y] - weight.mean(0)).sign().view(len(y), *shape)
        self._edge = kind == "at the edge"
        drawn = torch.rand(len(y), *shape, generator=generator)
        # At the edge a third of the pixels each: 0, 1, and in between.
        self._start = (3 * drawn - 1).clamp(0, 1) if self._edge else 0.25 + 0.5 * drawn
        self._turn = torch.rand(len(y), *shape, generator=generator)

    def at(self, place: Tensor) -> Images:
        """The images at a place from -1 to 1 of each path, (N,)."""
        share = place.view(-1, 1, 1, 1)
        if not self._edge:
            return (self._start + 0.75 * share * self._towards).clamp(0, 1)
        # One pixel after the other goes to the end that the class likes, or dislikes.
        best = (self._towards > 0).float()
        end = torch.where(share > 0, best, 1 - best)
        gone = ((share.abs() - self._turn) * self._turn[0].numel()).clamp(0, 1)
        return self._start + gone * (end - self._start)

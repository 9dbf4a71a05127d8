"""The victim with its random draws held still."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_local.attacks import Attack
from robustbench_local.data import Split
from robustbench_local.evaluation.audit.check import Check, found, skipped
from robustbench_local.evaluation.audit.comparison import (
    accuracy,
    is_more_than_chance,
    shares_apart,
)
from robustbench_local.evaluation.audit.config import Audit
from robustbench_local.evaluation.audit.switch import distance, seed_everything
from robustbench_local.evaluation.audit.trials import Trials
from robustbench_local.evaluation.audit.variations import single_draw
from robustbench_local.evaluation.evaluate import Judging
from robustbench_local.gradients import pristine
from robustbench_local.oracle import Oracle
from robustbench_local.randomness import derive_seed
from robustbench_local.types import Images, Logits, Model


class Frozen(nn.Module):
    """A random victim that meets every image with the same draws, whenever and beside whatever.

    Images go through it one by one, since draws belong to a place in the batch. It still declares
    itself `randomized`, so that attacks go the same way as with the victim itself.
    """

    randomized = True

    def __init__(self, victim: Model, seed: int) -> None:
        super().__init__()
        self.victim = victim
        self._seed = seed

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K)."""
        return torch.cat([self._answer(x[row : row + 1]) for row in range(len(x))])

    def _answer(self, x: Images) -> Logits:
        states = random.getstate(), np.random.get_state()
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices):
            try:
                seed_everything(self.victim, self._seed)
                logits: Tensor = self.victim(x)
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
        return logits


def frozen_randomness(
    oracle: Oracle, attack: Attack, split: Split, fresh: Tensor, *, config: Audit, seed: int
) -> Check:
    """Whether the attack does at least as well where the draws hold still, judged on those draws.

    If it does worse, it lives on the randomness, and the victim without it is not understood
    (Carlini et al. 2019, arXiv:1902.06705, section 5). `fresh` (N, draws) is what became of the
    same images, the first ones, under fresh draws. Every image has a draw of its own, so that no
    lucky one decides about all.
    """
    name, sample = "frozen_randomness", min(config.frozen_images, len(fresh))
    x = split.pixels(slice(0, sample))
    with pristine(oracle.victim), torch.no_grad():
        still = Frozen(oracle.victim, seed)
        off = distance(still(x), still(x))
    if off > config.spread:
        return skipped(
            name, f"the draws cannot be held still: with equal seeds outputs differ by {off:.2g}"
        )
    held = torch.cat([_held_still(oracle, attack, split, row, seed) for row in range(sample)])
    fresh = fresh[:sample]
    apart = shares_apart(held, fresh)  # above 0 where freezing made the attack weaker
    raised = is_more_than_chance(apart, config, random=True)
    measured = {"fresh": accuracy(fresh), "frozen": accuracy(held), "n": sample}
    why = (
        f"robust accuracy on {sample} images is {100 * measured['frozen']:.0f}% with the "
        f"randomness held still, {100 * measured['fresh']:.0f}% with fresh draws"
    )
    why += "; the attack should gain by it, so look for masked gradients" if raised else ""
    return found(name, raised, measured, why)


def _held_still(oracle: Oracle, attack: Attack, split: Split, row: int, seed: int) -> Tensor:
    """What becomes of one image, bool (1, 1)."""
    rows = slice(row, row + 1)
    trials = Trials(
        Oracle(
            Frozen(oracle.victim, derive_seed(seed, "frozen", row)),
            oracle.threat,
            oracle.num_classes,
            randomized=True,
        ),
        Split(split.images[rows], split.labels[rows], split.indices[rows]),
        judging=Judging(seed=seed),
        batch_size=1,
        sample=1,
    )
    return trials.run("frozen", single_draw(attack), oracle.threat)

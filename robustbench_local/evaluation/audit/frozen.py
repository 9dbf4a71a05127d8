"""The victim with its random draws held still."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_local.data import Split
from robustbench_local.evaluation.audit.case import Case
from robustbench_local.evaluation.audit.check import Check, count, found, skipped
from robustbench_local.evaluation.audit.comparison import (
    accuracy,
    is_more_than_chance,
    shares_apart,
)
from robustbench_local.evaluation.audit.switch import distance, seed_everything
from robustbench_local.evaluation.audit.trials import Trials
from robustbench_local.evaluation.audit.variations import black_box, open_to, single_draw
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


def frozen_randomness(case: Case) -> Check:
    """Whether the attack gains by draws that hold still, as it should, judged on those draws.

    Two signs that it lives on the randomness, or that the randomness hides a victim that the attack
    does not understand (Carlini et al. 2019, arXiv:1902.06705, section 5):

    - it does worse where the draws hold still;
    - it gains nothing by that, and a search with scores alone breaks, with the same draws, what it
      leaves.

    Deviation from that source, where gaining nothing is enough: neither does a sound attack gain on
    a sound network whose noise is harmless. What tells the two apart is that nothing else breaks
    the network with its draws held still. The second sign is looked for where the attack is one
    that `weaker_than_black_box` compares.

    Looked at are the first images that were attacked. What became of them under fresh draws and
    under one that is held still is in both cases one look of the judge at the attacked image, and
    every image has a draw of its own, so that no lucky one decides about all.
    """
    name, rows = "frozen_randomness", case.trials.right
    rows = rows[rows < case.config.frozen_images]
    if len(rows) == 0:
        first = count(case.config.frozen_images, "image")
        return skipped(name, f"none of the first {first} is classified correctly")
    x, _ = case.trials.rows(rows)
    with pristine(case.oracle.victim), torch.no_grad():
        still = Frozen(case.oracle.victim, case.seed)
        off = distance(still(x), still(x))
    if off > case.config.spread:
        return skipped(
            name, f"the draws cannot be held still: with equal seeds outputs differ by {off:.2g}"
        )
    fresh = case.base.correct[rows]
    held = torch.cat([_Still(case, row).attacked() for row in rows.tolist()])
    apart = shares_apart(held, fresh)  # above 0 where freezing made the attack weaker
    weaker = is_more_than_chance(apart, case.config, random=True)
    stronger = is_more_than_chance(-apart, case.config, random=True)
    measured: dict[str, Any] = {
        "fresh": accuracy(fresh),
        "frozen": accuracy(held),
        "n": len(rows),
        "broken_besides": None,
    }
    why = (
        f"robust accuracy on {count(len(rows), 'image')} is {100 * measured['frozen']:.0f}% with "
        f"the randomness held still, {100 * measured['fresh']:.0f}% with fresh draws"
    )
    if weaker:
        why += "; the attack should gain by it, so look for masked gradients"
        return found(name, True, measured, why)
    compared = case.why_not("weaker_than_black_box") is None
    if stronger or not compared:
        return found(name, False, measured, why)
    left = rows[held.any(1)]
    resists = [bool(_Still(case, row).searched().any()) for row in left.tolist()]
    besides = torch.tensor([not resisting for resisting in resists], dtype=torch.float64)
    measured["broken_besides"] = float(besides.sum())
    raised = is_more_than_chance(besides, case.config, random=False)
    if raised:
        why += (
            f", and a search with scores alone breaks {int(besides.sum())} of the {len(left)} that "
            "resist with the randomness held still; look for masked gradients"
        )
    return found(name, raised, measured, why)


class _Still:
    """One image, and the victim with a draw for it that is held still."""

    def __init__(self, case: Case, row: int) -> None:
        self._case, rows = case, slice(row, row + 1)
        self._oracle = Oracle(
            Frozen(case.oracle.victim, derive_seed(case.seed, "frozen", row)),
            case.threat,
            case.oracle.num_classes,
            randomized=True,
        )
        split = case.split
        self._trials = Trials(
            self._oracle,
            Split(split.images[rows], split.labels[rows], split.indices[rows]),
            judging=Judging(seed=case.seed),
            batch_size=1,
            sample=1,
        )

    def attacked(self) -> Tensor:
        """What becomes of the image under the attack, bool (1, draws)."""
        return self._trials.run("frozen", single_draw(self._case.attack), self._case.threat)

    def searched(self) -> Tensor:
        """What becomes of it under a search with scores alone."""
        attack, proposals = single_draw(self._case.attack), self._case.config.black_box_queries
        search, _ = black_box(attack, self._oracle, proposals)
        return self._trials.run("frozen search", search, open_to(self._case.threat, search))

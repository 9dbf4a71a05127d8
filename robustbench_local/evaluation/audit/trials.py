"""Attack a sample of test images again and again, each time judged by the harness."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from robustbench_local.attacks import Attack
from robustbench_local.data import Split
from robustbench_local.evaluation.audit.check import told
from robustbench_local.evaluation.evaluate import Judging
from robustbench_local.evaluation.judge import Verdict, exact, judge
from robustbench_local.oracle import Oracle
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels, Model

Face: TypeAlias = Callable[[Images, Labels, ThreatModel], Model]
"""Makes what an attack meets, for a batch of images."""


class VariationError(RuntimeError):
    """The attack under audit, or one it is compared with, could not be run."""


class Trials:
    """The first images of a test set, and what became of them under one attack after the other.

    `clean` are the draws of the judge, each image right or wrong, bool (N, draws) on the CPU. Right
    is after an attack also what the victim rejects, as in the evaluation. A random victim is asked
    twice at least: what one draw chooses another one scores, see `comparison.broken_besides`.
    """

    def __init__(
        self, oracle: Oracle, split: Split, *, judging: Judging, batch_size: int, sample: int
    ) -> None:
        rows = slice(0, sample)
        self.x, self.y = split.pixels(rows), split.labels[rows]
        self.victim, self.threat, self.classes = oracle.victim, oracle.threat, oracle.num_classes
        self.random = judging.draws > 1 or oracle.randomized is True
        self._randomized = oracle.randomized
        draws = max(2, judging.draws) if self.random else judging.draws
        self._judging, self._batch_size = replace(judging, draws=draws), batch_size
        looks = [
            self._ask(self.rows(part)[0], part, self.threat, "clean")
            for part in self.batches(torch.arange(len(self.x)))
        ]
        self.clean = torch.cat([look.correct for look in looks])

    def __len__(self) -> int:
        return len(self.x)

    @property
    def right(self) -> Tensor:
        """Rows of the images that are right in some draw: the ones worth attacking."""
        return self.clean.any(1).nonzero().squeeze(1)

    def run(
        self,
        name: str,
        attack: Attack,
        threat: ThreatModel,
        *,
        rows: Tensor | None = None,
        face: Face | None = None,
    ) -> Tensor:
        """Draws right after an attack on `rows`, bool (N, draws); others as they were before.

        `name` tells this look of the judge from the others. By default every right image is
        attacked, and the attack meets the victim behind an `Oracle`. Raises `VariationError` where
        the attack crashes or leaves its threat model.
        """
        rows = self.right if rows is None else rows
        correct = self.clean.clone()
        for part in self.batches(rows):
            x, y = self.rows(part)
            model = face(x, y, threat) if face else self.oracle(threat)
            if isinstance(model, Oracle):
                model.begin(len(x))
            self._reseed(name, part)
            try:
                with exact():
                    x_adv = attack(model, x, y, threat)
                verdict = self._ask(x_adv, part, threat, name)
            except Exception as error:
                raise VariationError(told(error)) from error
            correct[part] = verdict.resists
        return correct

    def batches(self, rows: Tensor) -> list[Tensor]:
        """Rows in the parts that are attacked together."""
        return list(torch.split(rows, self._batch_size)) if len(rows) else []

    def rows(self, rows: Tensor) -> tuple[Images, Labels]:
        """Some images and their labels."""
        there = rows.to(self.x.device)
        return self.x[there], self.y[there]

    def oracle(self, threat: ThreatModel) -> Oracle:
        """The victim, with the access that the threat model grants."""
        return Oracle(self.victim, threat, self.classes, randomized=self._randomized)

    def confirmed(self, x_adv: Images, rows: Tensor) -> Tensor:
        """Which images the judge takes for valid, accepted and wrong, bool (len(rows),)."""
        return ~self._ask(x_adv, rows, self.threat, "confirmed").resists.any(1)

    def _reseed(self, name: str, part: Tensor) -> None:
        if self._judging.reseed is not None:
            self._judging.reseed(derive_seed(self._judging.seed, "audit", name, int(part[0])))

    def _ask(self, x_adv: Images, part: Tensor, threat: ThreatModel, name: str) -> Verdict:
        x, y = self.rows(part)
        return judge(
            self.victim,
            x_adv,
            x,
            y,
            threat,
            num_classes=self.classes,
            draws=self._judging.draws,
            seed=derive_seed(self._judging.seed, "audit judge", name, int(part[0])),
            reseed=self._judging.reseed,
        )

"""What the checks of one attack share."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from robustbench_local.attacks import Attack
from robustbench_local.data import Split
from robustbench_local.evaluation.audit.applicability import why_not
from robustbench_local.evaluation.audit.check import count
from robustbench_local.evaluation.audit.comparison import is_more_than_chance
from robustbench_local.evaluation.audit.config import Audit
from robustbench_local.evaluation.audit.trials import Trials
from robustbench_local.evaluation.audit.variations import fresh
from robustbench_local.evaluation.audit.watched import Watched, watched
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Model


@dataclass(frozen=True)
class Case:
    """An attack under audit, the sample it is tried on, and the settings of the audit."""

    trials: Trials
    oracle: Oracle
    attack: Attack
    split: Split
    config: Audit
    seed: int
    sources: Mapping[str, Model]

    @cached_property
    def base(self) -> Watched:
        """The attack on the sample as the evaluation runs it."""
        paths = self.why_not("loss_still_falling") is None
        return watched(self.trials, fresh(self.attack), paths=paths)

    @property
    def threat(self) -> ThreatModel:
        """That of the evaluation."""
        return self.trials.threat

    @property
    def survivors(self) -> Tensor:
        """Rows of the images that resist the attack in some draw."""
        return self.base.correct.any(1).nonzero().squeeze(1)

    def why_not(self, name: str) -> str | None:
        """The reason for which a check does not apply; None where it does."""
        if len(self.trials.right) == 0:
            return f"none of {count(len(self.trials), 'image')} is classified correctly"
        return why_not(name, self.attack, self.threat, self.config, random=self.trials.random)

    def differs(self, apart: Tensor, points: float = 0.0) -> bool:
        """Whether images that come out differently are more than chance, see `comparison`."""
        return is_more_than_chance(apart, self.config, random=self.trials.random, points=points)

"""The original AutoAttack, as its authors publish it: the yardstick."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.errors import UserError
from robustbench_local.threat import TOLERANCE, ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm

Version: TypeAlias = Literal["standard", "plus", "rand"]

_NORM_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_ROUNDING = 5 * TOLERANCE
"""Excess over the budget that float32 sums explain; what is more is left to the judge."""


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack (Croce and Hein 2020, arXiv:2003.01690) by the package `pyautoattack`.

    - `version`: `standard` (APGD-CE, APGD-T, FAB-T, Square), `plus`, or `rand` for randomised
      victims. `steps`, `queries`: of each gradient attack and of Square; other values than 100 and
      5000 are not AutoAttack any more.

    Deviations: the batch of the evaluation is its batch. With few classes there are at most K - 1
    targets; APGD-T (below 4 classes) and APGD-DLR (below 3), which have no loss there, are left
    out; the report says so. What exceeds epsilon by a rounding is brought back. One noisy draw
    decides "fooled" there, so only the judge's draws tell about a randomised victim.
    """

    needs: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2", "l1"})
    foreign: ClassVar[bool] = True
    serves_rejection: ClassVar[bool] = False

    version: Version = "standard"
    steps: int = 100
    queries: int = 5000

    def __post_init__(self) -> None:
        for name in ("steps", "queries"):
            require_count(name, getattr(self, name))
        if self.version not in get_args(Version):
            raise UserError(
                f"attack.version={self.version} is unknown; expected one of "
                f"{', '.join(get_args(Version))}"
            )

    def require(self, threat: ThreatModel) -> None:
        """Raise `UserError` also for a query budget and where the package is not installed."""
        super().require(threat)
        if threat.query_budget is not None:
            raise UserError(
                f"threat.query_budget={threat.query_budget} is not kept by AutoAttack; type "
                "threat.query_budget=null or attack=square"
            )
        if find_spec("pyautoattack") is None:
            raise UserError(
                "attack=autoattack needs the package pyautoattack, which is not installed; type "
                "pip install pyautoattack"
            )

    @property
    def draws_averaged(self) -> int:
        """20 in the authors' version for randomised victims."""
        return 20 if self.version == "rand" else 1

    def report(self, threat: ThreatModel) -> Mapping[str, Any]:
        """`left_out`: the parts that have no loss for so few classes."""
        return dict(self.notes)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """All parts of the version, as the authors order and set them."""
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        x = x.contiguous()  # their code flattens with `view`
        with _sandboxed():
            attack = self._build(model, x, threat, classes)
            x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        x_adv = x_adv.detach()
        limit = threat.epsilon + _ROUNDING * max(1.0, threat.epsilon)
        rounded = (threat.size(x_adv, x) <= limit).view(-1, 1, 1, 1)
        return torch.where(rounded, threat.project(x_adv, x), x_adv)

    def _build(self, model: Model, x: Images, threat: ThreatModel, classes: int) -> Any:
        import pyautoattack  # not at the top: an optional package

        attack = pyautoattack.AutoAttack(
            model,
            norm=_NORM_NAMES[threat.norm],
            eps=threat.epsilon,
            seed=self.seed,
            device=x.device,
            version=self.version,
        )
        for apgd in (attack.apgd, attack.apgd_targeted):
            if self.steps != apgd.n_iter:  # what its constructor derives from the number of steps
                apgd.n_iter = apgd.n_iter_orig = self.steps
                apgd.n_iter_2 = max(int(0.22 * self.steps), 1)
                apgd.n_iter_min = max(int(0.06 * self.steps), 1)
                apgd.size_decr = max(int(0.03 * self.steps), 1)
        attack.fab.n_iter, attack.square.n_queries = self.steps, self.queries
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        least = {"apgd-dlr": 3, "apgd-t": 4}
        chosen = attack.attacks_to_run
        left_out = [name for name in chosen if classes < least.get(name, 0)]
        if left_out:
            told = [f"{name} (fewer than {least[name]} classes)" for name in left_out]
            self.notes["left_out"] = ", ".join(told)
        attack.attacks_to_run = [name for name in chosen if classes >= least.get(name, 0)]
        return attack


@contextmanager
def _sandboxed() -> Iterator[None]:
    """Keep its log quiet, and take back the trace function that one of its checks removes."""
    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
        sys.settrace(trace)

"""Judge, oracle, audit: what turns the output of an attack into a number that can be believed."""

from robustbench_local.evaluation.audit import SAMPLE, Flag, audit, is_random
from robustbench_local.evaluation.evaluate import Judging, Outcomes, PerExample, evaluate
from robustbench_local.evaluation.judge import Verdict, judge
from robustbench_local.evaluation.oracle import Oracle, QueryBudgetError

__all__ = [
    "SAMPLE",
    "Flag",
    "Judging",
    "Oracle",
    "Outcomes",
    "PerExample",
    "QueryBudgetError",
    "Verdict",
    "audit",
    "evaluate",
    "is_random",
    "judge",
]

"""Judge, audit: what turns the output of an attack into a number that can be believed."""

from robustbench_local.evaluation.audit import (
    Audit,
    Check,
    audit_attack,
    audit_victim,
    is_random,
)
from robustbench_local.evaluation.eot import Averaging, Samples, audit_samples, raise_samples
from robustbench_local.evaluation.evaluate import (
    Judging,
    Outcomes,
    PerExample,
    evaluate,
    evaluate_curve,
)
from robustbench_local.evaluation.judge import Verdict, exact, judge

__all__ = [
    "Audit",
    "Averaging",
    "Check",
    "Judging",
    "Outcomes",
    "PerExample",
    "Samples",
    "Verdict",
    "audit_attack",
    "audit_samples",
    "audit_victim",
    "evaluate",
    "evaluate_curve",
    "exact",
    "is_random",
    "judge",
    "raise_samples",
]

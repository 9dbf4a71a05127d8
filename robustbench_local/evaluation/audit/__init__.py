"""Signs that a number should not be believed: what was measured, and the flags of a record."""

from robustbench_local.evaluation.audit.attack import audit_attack
from robustbench_local.evaluation.audit.check import COSTLY, OF_THE_ATTACK, SEVERE, Check, flags
from robustbench_local.evaluation.audit.config import Audit
from robustbench_local.evaluation.audit.victim import audit_victim, is_random

__all__ = [
    "COSTLY",
    "OF_THE_ATTACK",
    "SEVERE",
    "Audit",
    "Check",
    "audit_attack",
    "audit_victim",
    "flags",
    "is_random",
]

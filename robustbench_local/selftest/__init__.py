"""Run any attack against victims whose answer is known: `python -m robustbench_local.selftest`."""

from robustbench_local.selftest.run import Maker, Outcome, selftest

__all__ = ["Maker", "Outcome", "selftest"]

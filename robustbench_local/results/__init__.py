"""Records, the leaderboard folded from them, statistics, and what a person sees."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustbench_local.results.leaderboard import fold, write_leaderboard
    from robustbench_local.results.statistics import Interval, wilson
    from robustbench_local.results.store import Record, Store

__all__ = ["Interval", "Record", "Store", "fold", "wilson", "write_leaderboard"]

_HOMES = {
    "fold": "leaderboard",
    "write_leaderboard": "leaderboard",
    "Interval": "statistics",
    "wilson": "statistics",
    "Record": "store",
    "Store": "store",
}


def __getattr__(name: str) -> object:
    """Imported when asked for: `python -m robustbench_local.results --help` must not wait."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

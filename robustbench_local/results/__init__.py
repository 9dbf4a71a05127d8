"""Records, the leaderboard folded from them, statistics, and what a person sees."""

from robustbench_local.results.leaderboard import fold, write_leaderboard
from robustbench_local.results.statistics import Interval, wilson
from robustbench_local.results.store import Record, Store

__all__ = ["Interval", "Record", "Store", "fold", "wilson", "write_leaderboard"]

"""One line of the leaderboard: everything known about a defended model under a threat model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from robustbench_local.results.doubts import (
    RANKING_ATTACKS,
    Doubt,
    is_withheld,
    standing,
    starred,
)
from robustbench_local.results.statistics import Interval
from robustbench_local.results.summary import ROW, Summary
from robustbench_local.results.worst_case import WorstCase, worst_case, worst_interval

if TYPE_CHECKING:
    from robustbench_local.results.store import Store

MEASURES = ("clean_accuracy", "worst_case")
"""The accuracies of every line, beside those of its attacks."""

ENDS = ("", "_low", "_high")
"""An accuracy has a column for itself and one for each of its limits."""


@dataclass
class Line:
    """A line of the table, and for the ranks its worst case per seed."""

    fields: dict[str, object]
    accuracies: dict[str, Interval]
    outcomes: list[WorstCase]

    @property
    def place(self) -> tuple[Any, ...]:
        """Sorts the best first."""
        best = (self.accuracies[measure].value for measure in ("worst_case", "clean_accuracy"))
        names = (self.fields[key] for key in ("model", "defense", "train", "origin"))
        return (*(-value for value in best), *names)

    def cells(self) -> dict[str, object]:
        """What stands in each column."""
        named = {
            f"{measure}{end}": value
            for measure, interval in self.accuracies.items()
            for end, value in zip(ENDS, interval, strict=True)
        }
        return {**self.fields, **named}


def line_of(store: "Store", row: list[Summary], origin: str) -> Line:
    """Everything known about one defended model under one threat model.

    - Of a seed counts what was measured on its latest weights (`victim_of`).
    - Of an attack run again the latest counts, but weaker evidence replaces nothing: of runs with
      other draws of a random victim the lowest robust accuracy counts (`strongest`), and a flag of
      any of them stands until its check finds nothing (`standing`).
    - The seeds that have met every attack of the line count, and are averaged; while none has, all
      do, `worst_case` is that of the worst seed, and the line is `incomplete`. So `worst_case`, per
      example over the attacks of a seed and then averaged, is never above any attack's column. The
      limits stay those of one test set, the widest of any seed.
    """
    runs = latest_runs(row)
    attacks = sorted({attack for met in runs.values() for attack in met})
    complete = {seed: met for seed, met in runs.items() if len(met) == len(attacks)}
    counted = complete or runs
    cells = {
        seed: {attack: strongest(same) for attack, same in met.items()}
        for seed, met in counted.items()
    }
    used = [run for cell in cells.values() for run in cell.values()]
    doubts = [
        doubt for met in counted.values() for same in met.values() for doubt in standing(same)
    ]
    behind = [*used, *(doubt.run for doubt in doubts if doubt.flag["severe"])]
    ranking = any(run.attack in RANKING_ATTACKS for run in used)
    withheld = any(is_withheld(met) for met in counted.values())
    met_by = {
        attack: [cell[attack] for cell in cells.values() if attack in cell] for attack in attacks
    }

    outcomes = [worst_case(store, list(cell.values())) for cell in cells.values()]
    worst = [float(outcome.images.mean()) for outcome in outcomes]
    value = float(np.mean(worst) if complete else np.min(worst))
    first = used[0]
    accuracies = {
        "clean_accuracy": _mean([next(iter(cell.values())).clean for cell in cells.values()]),
        "worst_case": worst_interval(value, outcomes),
        **{attack: _mean([run.robust for run in met]) for attack, met in met_by.items()},
    }
    fields: dict[str, object] = {
        **dict(zip(ROW, first.row, strict=True)),
        "origin": origin,
        "rank": None,
        "status": _status(ranking=ranking, complete=bool(complete), withheld=withheld),
        "worst_case_sd": float(np.std(worst, ddof=1)) if complete and len(worst) > 1 else None,
        "worst_case_worst_seed": min(worst),
        "n": first.n,
        "seeds": " ".join(map(str, sorted(counted))),
        "queries": _sum(_over_seeds(run.forward for run in met) for met in met_by.values()),
        "training_seconds": _over_seeds(
            next(iter(cell.values())).training_seconds for cell in cells.values()
        ),
        "attack_seconds": _sum(
            _over_seeds(run.attack_seconds for run in met) for met in met_by.values()
        ),
        "parameters": first.parameters,
        "flags": _flags(doubts, used),
        "comparability": first.comparability,
        "run_ids": " ".join(sorted({run.run_id for run in behind})),
    }
    return Line(fields, accuracies, outcomes)


def _flags(doubts: Sequence[Doubt], used: Sequence[Summary]) -> str:
    """The names of all doubts, those about the trainings among them."""
    trainings = {name for run in used for name in run.warnings}
    return " ".join(sorted({*starred(doubt.flag for doubt in doubts).split(), *trainings}))


def _mean(accuracies: Sequence[Interval]) -> Interval:
    """The mean over the seeds, with the limits of the seed whose interval is the widest."""
    mean = float(np.mean([each.value for each in accuracies]))
    return _moved(max(accuracies, key=_width), mean)


def _width(interval: Interval) -> float:
    return interval.high - interval.low


def _moved(interval: Interval, value: float) -> Interval:
    """The limits as far from another value."""
    moved = value - interval.value
    return Interval(value, max(0.0, interval.low + moved), min(1.0, interval.high + moved))


def _over_seeds(figures: Iterable[float | None]) -> float | None:
    """Their mean; None where one is unknown."""
    known = list(figures)
    total = _sum(known)
    return None if total is None else total / len(known)


def _sum(figures: Iterable[float | None]) -> float | None:
    total = 0.0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total


def latest_runs(row: Sequence[Summary]) -> dict[int, dict[str, list[Summary]]]:
    """For each seed and attack its runs on the latest weights of the seed, in order of time."""
    runs: dict[int, dict[str, list[Summary]]] = {}
    for run in sorted(row, key=lambda run: run.finished):
        met = runs.setdefault(run.seed, {})
        if any(other[-1].victim != run.victim for other in met.values()):
            met.clear()
        met.setdefault(run.attack, []).append(run)
    return runs


def strongest(runs: Sequence[Summary]) -> Summary:
    """What counts of one attack on one victim; `runs` are in order of time.

    The latest, unless runs differ in the draws of a random victim, by the judge or averaged by the
    attack, which no label names: then the lowest robust accuracy among the latest of each.
    """
    latest = {(run.judge_draws, run.averaged): run for run in runs}
    return min(latest.values(), key=lambda run: run.robust.value)


def _status(*, ranking: bool, complete: bool, withheld: bool) -> str:
    if withheld:
        return "withheld"
    if not complete:
        return "incomplete"
    return "ranked" if ranking else "provisional"

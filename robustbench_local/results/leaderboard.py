"""The leaderboard: folded from the records, never edited, replaced as a whole."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from robustbench_local.files import atomic_path, remove_leftovers
from robustbench_local.identity import PACKAGE
from robustbench_local.results.doubts import RANKING_ATTACKS, starred
from robustbench_local.results.lines import ENDS, MEASURES, Line, line_of, strongest
from robustbench_local.results.ranking import ranks
from robustbench_local.results.store import Store
from robustbench_local.results.summary import ROW, Summary, victim_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "RANKING_ATTACKS", "ROW", "fold", "starred", "strongest", "victim_of",
    "write_leaderboard",
]  # fmt: skip

REFERENCE = next(
    folder
    for folder in (PACKAGE / "reference", PACKAGE.parent / "results" / "reference")
    if folder.is_dir() or folder.parent != PACKAGE
)
"""The results folder that is shipped: in the wheel, or in a checkout."""


_SECONDS = ("training_seconds", "attack_seconds")


def write_leaderboard(store: Store) -> Path:
    """Fold all records and replace `leaderboard.csv`; safe beside other runs that do the same."""
    store.folder.mkdir(parents=True, exist_ok=True)
    path = store.folder / "leaderboard.csv"
    with store.lock():
        remove_leftovers(path)
        table = fold(store)
        with atomic_path(path) as temporary:
            table.to_csv(temporary, index=False)
    return path


def fold(store: Store) -> "pd.DataFrame":
    """One line per (dataset, model, training, defense, threat, awareness), best first.

    Sorted by worst case within a comparability key. Accuracies are fractions with their 95%
    limits; an attack that the line has not met is empty. Of the shipped records those lines are
    there, as of origin `reference`, that are comparable with a local one. Columns: README.
    """
    import pandas as pd  # not at the top: a run that is refused does without

    lines = list(_lines(store))
    attacks = sorted({attack for line in lines for attack in line.accuracies} - {*MEASURES})
    spread = ["worst_case_sd", "worst_case_worst_seed"]
    measures = [f"{measure}{end}" for measure in MEASURES for end in ENDS]
    columns = [*ROW, "origin", "rank", "status", *measures, *spread]
    columns += [f"{attack}{end}" for attack in attacks for end in ENDS]
    columns += ["n", "seeds", "queries", *_SECONDS, "parameters"]
    columns += ["flags", "comparability", "run_ids"]
    table = pd.DataFrame([line.cells() for line in lines], columns=columns)
    whole, real = ("rank", "parameters"), ("worst_case_sd", "queries", *_SECONDS)
    table = table.astype({**dict.fromkeys(whole, "Int64"), **dict.fromkeys(real, "float64")})
    return table.sort_values(["dataset", "comparability"], kind="stable", ignore_index=True)


def _lines(store: Store) -> Iterator[Line]:
    """All lines, those of one comparability key together, best first and with their ranks."""
    is_reference = store.folder.resolve() == REFERENCE.resolve()
    shipped = Store(REFERENCE, repairs=False)
    tables: dict[str, list[tuple[Store, list[Summary]]]] = defaultdict(list)
    for row in _rows(store.summaries()):
        tables[row[0].comparability].append((store, row))
    if tables and not is_reference:
        known = {run.run_id for rows in tables.values() for _, row in rows for run in row}
        for row in _rows(_shipped(REFERENCE)):
            copied = known.issuperset(run.run_id for run in row)
            if row[0].comparability in tables and not copied:
                tables[row[0].comparability].append((shipped, row))
    for rows in tables.values():
        lines = [
            line_of(of, row, "reference" if is_reference or of is shipped else "local")
            for of, row in rows
        ]
        lines.sort(key=lambda line: line.place)
        ranked = [line for line in lines if line.fields["status"] == "ranked"]
        for line, rank in zip(ranked, ranks([line.outcomes for line in ranked]), strict=True):
            line.fields["rank"] = rank
        for line in lines:
            line.outcomes = []  # those of all tables at once would be the most of what is held
            yield line


@cache
def _shipped(folder: Path) -> tuple[Summary, ...]:
    """The shipped records: of the runs of a process only the first waits for them."""
    return tuple(Store(folder, repairs=False).summaries())


def _rows(runs: Iterable[Summary]) -> list[list[Summary]]:
    """The runs of each line."""
    rows: dict[tuple[str, ...], list[Summary]] = defaultdict(list)
    for run in runs:
        rows[(run.comparability, *map(str, run.row))].append(run)
    return list(rows.values())

"""The runs of a sweep side by side: what attacks make of a defense they ignore, or know."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_local.display import output
from robustbench_local.files import atomic_path
from robustbench_local.identity import content_id
from robustbench_local.results.leaderboard import starred, victim_of
from robustbench_local.results.report import print_title, radius_in_words
from robustbench_local.results.store import Record, Store
from robustbench_local.results.summary import summarise
from robustbench_local.results.worst_case import worst_case, worst_interval

VICTIM = ("dataset", "model", "train", "defense", "seed")
"""What names a row of the table."""

MEASURED_ON = ("weights", "test")
"""What else tells rows apart: hashes of the victim's weights and of the test images, shortened."""

THREAT = ("norm", "epsilon", "access", "query_budget")
"""What attacks have in common that count into one worst case, beside the row."""

# Flags that the column of an awareness says already.
_KNOWN = {"oblivious": {"oblivious"}, "adaptive": set[str]()}


def compare(records: Sequence[Record], folder: str) -> Path:
    """Print the table of a sweep, and write it below the results `folder`; returns the file."""
    store = Store(Path(folder).expanduser())
    table = tabulate(store, records)
    key = content_id({"runs": sorted({str(record["run_id"]) for record in records})})
    path = store.folder / "comparisons" / f"{key[:8]}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.lock(), atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
    console = output()
    console.print()
    _show(table, console, path, rejects=any(record.get("detection") for record in records))
    return path


def tabulate(store: Store, records: Sequence[Record]) -> pd.DataFrame:
    """A line for each victim, attack, threat model and awareness, and the worst case of each.

    Columns: those of `VICTIM`, `MEASURED_ON` and `THREAT`, `attack`, `awareness`, `clean`, `robust`
    with its 95% limits `low` and `high`, `n`, `judge_draws`, `eot_samples` (draws averaged
    by the attack; empty where it averages none), `reduced` (what the attack did less of behind a
    random victim), `flags` (a star marks severe ones), how many of them are `severe` (other than
    what `oblivious` attacks bring with them) and `run_id`.

    The worst case (attack `worst_case`, awareness `any`) is taken per example over all attacks on
    the victim under the threat model, knowing of the defense or not, and then averaged; see
    `worst_case.worst_case`. It has the flags of all. In order of the sweep.
    """
    lines: list[dict[str, Any]] = []
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in {record["run_id"]: record for record in records}.values():
        groups.setdefault(tuple(_terms(record).values()), []).append(record)
    for group in groups.values():
        common = _terms(group[0])
        lines += [{**common, **_line(record)} for record in group]
        lines.append({**common, **_worst(store, group)})
    return pd.DataFrame(lines)


def _terms(record: Record) -> dict[str, object]:
    """What is comparable: the comparability key apart from awareness, and the very same victim."""
    budget = record["config"]["threat"]["query_budget"]
    return {
        **{key: record["labels"][key] for key in VICTIM if key != "seed"},
        "seed": record["seed"],
        "weights": "+".join(sha256[:8] for sha256 in victim_of(record)),
        "test": record["dataset"]["test_fingerprint"][:8],
        **{key: record["labels"][key] for key in THREAT if key != "query_budget"},
        "query_budget": "" if budget is None else budget,
    }


def _line(record: Record) -> dict[str, Any]:
    robust = record["robust_accuracy"]
    averaged = record.get("eot") or {}
    return {
        "attack": record["labels"]["attack"],
        "awareness": record["labels"]["awareness"],
        "clean": record["clean_accuracy"]["value"],
        "robust": robust["value"],
        "low": robust["low"],
        "high": robust["high"],
        "n": record["n"],
        "judge_draws": record["judge_draws"],
        "eot_samples": averaged.get("samples"),
        "reduced": record.get("attack_report", {}).get("reduced"),
        **_doubts([record]),
        "run_id": record["run_id"],
    }


def _doubts(records: Sequence[Record]) -> dict[str, object]:
    flags = [flag for record in records for flag in record["flags"]]
    doubted = {
        flag["name"]
        for record in records
        for flag in record["flags"]
        if flag["severe"] and flag["name"] not in _KNOWN[record["labels"]["awareness"]]
    }
    return {"flags": starred(flags), "severe": len(doubted)}


def _worst(store: Store, records: Sequence[Record]) -> dict[str, Any]:
    outcome = worst_case(store, [summarise(record) for record in records])
    value, low, high = worst_interval(float(outcome.images.mean()), [outcome])
    return {
        **_line(records[0]),
        "attack": "worst_case",
        "awareness": "any",
        "robust": value,
        "low": low,
        "high": high,
        "eot_samples": None,
        "reduced": None,
        **_doubts(records),
        "run_id": " ".join(str(record["run_id"]) for record in records),
    }


def _show(table: pd.DataFrame, console: Console, path: Path, *, rejects: bool = False) -> None:
    """A row for each victim, a column for each attack: oblivious / adaptive where both ran.

    `rejects` says that a victim may reject images. Where the console is too narrow for all columns
    the table goes on below itself.
    """
    told = _telling(table)
    heads = [*THREAT, "attack"]
    columns = table[heads].drop_duplicates()
    columns = columns.sort_values("attack", key=lambda name: name == "worst_case", kind="stable")
    both = bool((table["awareness"] == "oblivious").any())
    names = [[key] for key in told]
    figures = [["clean"]]
    for _, column in columns.iterrows():
        name = " ".join([str(column["attack"]), *_threat(column, table)])
        figures.append([name.replace("_", " ")])
    for _, victim in table.groupby([*VICTIM, *MEASURED_ON], sort=False):
        first = victim.iloc[0]
        for key, cells in zip(told, names, strict=True):
            cells.append(_breakable(str(first[key])) if key in VICTIM else str(first[key]))
        figures[0].append(f"{100 * first['clean']:.1f}")
        for (_, column), cells in zip(columns.iterrows(), figures[1:], strict=True):
            same = (victim[heads] == column).all(axis=1)
            cells.append(_cell(victim[same], both=both))
    title = ", ".join(str(name) for name in table["dataset"].unique())
    print_title(f"{title}: robust accuracy in %", console)
    _print(names, figures, console)
    farthest = np.maximum(table["high"] - table["robust"], table["robust"] - table["low"]).max()
    n = " or ".join(str(count) for count in sorted(table["n"].unique()))
    reading = "each cell: attack that ignores the defense / that knows it; " if both else ""
    if rejects:
        reading += "rejecting an attacked image counts as robust; "
    if table.duplicated([*VICTIM, *MEASURED_ON, *heads, "awareness"]).any():
        reading += "several figures: runs that differ in what no name says, in order of the sweep; "
    console.print(
        f"{reading}n = {n}, 95% limits at most {100 * farthest:.1f} points away; "
        f"{'* a severe flag: ' if (table['severe'] > 0).any() else ''}see {escape(str(path))}",
        soft_wrap=True,
    )
    reduced = table.dropna(subset="reduced")[["attack", "reduced"]].drop_duplicates()
    for attack, less in reduced.itertuples(index=False):
        console.print(f"† {escape(f'{attack}: {less}')}", soft_wrap=True)


def _print(
    names: Sequence[Sequence[str]], figures: Sequence[Sequence[str]], console: Console
) -> None:
    """A table of columns, headings first; the `names` again before figures that find no room.

    Names and headings are broken between words, figures not at all: rich would cut both.
    """
    room = console.width - 1 - sum(_width(" ".join(column).split()) for column in names)
    while figures:
        narrow = [_width([*heading.split(), *cells]) for heading, *cells in figures]
        fitting = max(1, int((np.cumsum(narrow) <= room).sum()))
        columns = [*names, *figures[:fitting]]
        tight = sum(map(_width, columns)) >= console.width
        shown = Table()
        for name in names:
            shown.add_column(escape(name[0]), overflow="fold")
        for figure, width in zip(figures[:fitting], narrow, strict=False):
            inside = width - _BORDER if tight else None
            shown.add_column(escape(figure[0]), justify="right", width=inside)
        for row in list(zip(*columns, strict=True))[1:]:
            shown.add_row(*map(escape, row))
        console.print(shown)
        figures = figures[fitting:]


_BORDER = 3
"""What a column takes beside its cells: a line, and a blank on each side of them."""


def _width(texts: Sequence[str]) -> int:
    """Of a column that breaks none of the texts."""
    return max(map(cell_len, texts)) + _BORDER


def _breakable(name: str) -> str:
    """A name that a narrow terminal breaks between its words."""
    return name.replace("+", " + ").replace("_", " ")


def _telling(table: pd.DataFrame) -> list[str]:
    """The keys that tell the rows apart."""
    rows = table.drop_duplicates([*VICTIM, *MEASURED_ON])
    told = [key for key in (*VICTIM, "n") if rows[key].nunique() > 1] or ["defense"]
    if rows.duplicated(told).any():
        told += [key for key in MEASURED_ON if rows[key].nunique() > 1]
    return told


def _threat(column: pd.Series, table: pd.DataFrame) -> list[str]:
    """What a heading has to say of the threat model: what is not the same everywhere."""
    words = []
    if len(table[["norm", "epsilon"]].drop_duplicates()) > 1:
        words += [str(column["norm"]), radius_in_words(column["epsilon"])]
    if table["access"].nunique() > 1:
        words.append(str(column["access"]))
    if table["query_budget"].nunique() > 1:
        words.append(f"{column['query_budget'] or 'unlimited'} queries")
    return words


def _cell(lines: pd.DataFrame, *, both: bool) -> str:
    found: dict[str, list[str]] = {}
    for _, line in lines.iterrows():
        marks = ("*" if line["severe"] else "") + ("†" if isinstance(line["reduced"], str) else "")
        figure = f"{100 * line['robust']:.1f}{marks}"
        found.setdefault(str(line["awareness"]), []).append(figure)
    told = {awareness: ", ".join(figures) for awareness, figures in found.items()}
    if "any" in told:
        return told["any"]
    if not both:
        return told.get("adaptive", "-")
    return f"{told.get('oblivious', '=')} / {told.get('adaptive', '-')}"

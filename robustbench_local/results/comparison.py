"""The runs of a sweep side by side: what attacks make of a defense they ignore, or know."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_local.files import atomic_path
from robustbench_local.identity import content_id
from robustbench_local.results.leaderboard import worst_case
from robustbench_local.results.statistics import wilson
from robustbench_local.results.store import Record, Store

VICTIM = ("dataset", "model", "train", "defense")
"""What names a row of the table, beside the training seed."""


def compare(records: Sequence[Record], folder: str) -> Path:
    """Print the table of a sweep, and write it below the results `folder`; returns the file."""
    store = Store(Path(folder).expanduser())
    table = tabulate(store, records)
    key = content_id({"runs": sorted({str(record["run_id"]) for record in records})})
    path = store.folder / "comparisons" / f"{key[:8]}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.lock(), atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
    _show(table, Console(), path)
    return path


def tabulate(store: Store, records: Sequence[Record]) -> pd.DataFrame:
    """A line for each victim, attack, threat model and awareness, and the worst case of each.

    Columns: what names the victim, `seed`, `norm`, `epsilon`, `attack`, `awareness`, `clean`,
    `robust` with its 95% Wilson limits `low` and `high`, `n`, `judge_draws`, `eot_samples` (draws
    averaged by the attack; empty where it averages none), `flags`, how many of them are `severe`
    (other than `oblivious`, which says nothing new here) and `run_id`.

    The worst case (attack `worst_case`, awareness `any`) is taken per example over all attacks on
    the victim under the threat model, knowing of the defense or not, and then averaged; for a
    random victim it is the strongest attack's mean. In order of the sweep.
    """
    lines: list[dict[str, Any]] = []
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in {record["run_id"]: record for record in records}.values():
        labels = record["labels"]
        name = (*(labels[key] for key in VICTIM), record["seed"], labels["norm"], labels["epsilon"])
        groups.setdefault(name, []).append(record)
    for name, group in groups.items():
        common = dict(zip((*VICTIM, "seed", "norm", "epsilon"), name, strict=True))
        lines += [{**common, **_line(record)} for record in group]
        lines.append({**common, **_worst(store, group)})
    return pd.DataFrame(lines)


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
        "flags": " ".join(sorted(flag["name"] for flag in record["flags"])),
        "severe": sum(flag["severe"] for flag in record["flags"] if flag["name"] != "oblivious"),
        "run_id": record["run_id"],
    }


def _worst(store: Store, records: Sequence[Record]) -> dict[str, Any]:
    n = records[0]["n"]
    value, low, high = wilson(worst_case(store, records) * n, n)
    return {
        **_line(records[0]),
        "attack": "worst_case",
        "awareness": "any",
        "robust": value,
        "low": low,
        "high": high,
        "eot_samples": None,
        "flags": "",
        "severe": 0,
        "run_id": " ".join(str(record["run_id"]) for record in records),
    }


def _show(table: pd.DataFrame, console: Console, path: Path) -> None:
    """A row for each victim, a column for each attack: oblivious / adaptive where both ran."""
    threats = table[["norm", "epsilon"]].drop_duplicates()
    title = ", ".join(str(name) for name in table["dataset"].unique())
    shown = Table(title=escape(f"{title}: robust accuracy in %"), title_justify="left")
    told = [key for key in (*VICTIM[1:], "seed") if table[key].nunique() > 1] or ["defense"]
    for key in told:
        shown.add_column(key, overflow="fold")
    shown.add_column("clean", justify="right")
    columns = table[["attack", "norm", "epsilon"]].drop_duplicates()
    both = bool((table["awareness"] == "oblivious").any())
    heads = []
    for _, column in columns.sort_values("attack", key=lambda name: name == "worst_case",
                                         kind="stable").iterrows():  # fmt: skip
        threat = f" {column['norm']} {column['epsilon']:.3g}" if len(threats) > 1 else ""
        heads.append(column)
        shown.add_column(f"{column['attack']}{threat}".replace("_", " "), justify="right")
    for _, victim in table.groupby([*VICTIM, "seed"], sort=False):
        cells = [escape(str(victim.iloc[0][key])) for key in told]
        cells.append(f"{100 * victim['clean'].iloc[0]:.1f}")
        for head in heads:
            same = (victim[["attack", "norm", "epsilon"]] == head).all(axis=1)
            cells.append(_cell(victim[same], both=both))
        shown.add_row(*cells)
    console.print(shown)
    widest = float((table["high"] - table["low"]).max()) / 2
    n = " or ".join(str(count) for count in sorted(table["n"].unique()))
    reading = "each cell: attack that ignores the defense / that knows it; " if both else ""
    console.print(
        f"{reading}n = {n}, 95% intervals at most +-{100 * widest:.1f} points; * a severe flag: "
        f"see {escape(str(path))}",
        soft_wrap=True,
    )


def _cell(lines: pd.DataFrame, *, both: bool) -> str:
    found: Mapping[str, str] = {
        str(line["awareness"]): f"{100 * line['robust']:.1f}{'*' if line['severe'] else ''}"
        for _, line in lines.iterrows()
    }
    if "any" in found:
        return found["any"]
    if not both:
        return found.get("adaptive", "-")
    return f"{found.get('oblivious', '=')} / {found.get('adaptive', '-')}"

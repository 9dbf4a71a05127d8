"""A single record in full, for a person."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_local.results.report import (
    doubts,
    print_title,
    radius_in_words,
    show_certificate,
)
from robustbench_local.results.store import Record

_ACCURACIES = (("clean", "clean_accuracy"), ("robust", "robust_accuracy"))

_ELSEWHERE = frozenset(
    {"version", "run_id", "finished", "labels", "seed", "n", "clean_accuracy", "robust_accuracy",
     "accuracy_of_draws", "metrics", "certified", "flags", "audit", "environment", "config",
     "examples_sha256", "examples_bytes", "leaderboard"}
)  # fmt: skip
"""Keys that have a place of their own, or that a person does not read."""


def show_record(record: Record, console: Console) -> None:
    """Print its numbers with intervals, its doubts, metrics, environment and configuration."""
    labels = record["labels"]
    print_title(
        f"{labels['dataset']}: {labels['model']} ({labels['train']}), defense {labels['defense']}, "
        f"attack {labels['attack']}, {labels['norm']} {radius_in_words(labels['epsilon'])}, access "
        f"to {labels['access']}, {labels['awareness']}",
        console,
    )
    told = f"run {record['run_id']}, seed {record['seed']}, finished {record['finished']}"
    console.print(told, highlight=False, soft_wrap=True)
    console.print(_accuracies(record))
    for sentence in dict.fromkeys(doubts(record)):
        console.print(f"[yellow]note[/yellow] {escape(sentence)}", soft_wrap=True, highlight=False)
    if record.get("certified"):
        show_certificate(record, console)
        rest = {key: value for key, value in record["certified"].items() if key != "radii"}
        _section("certificate", rest, console)
    if record.get("metrics"):
        _show_metrics(record, console)
    rest = {key: value for key, value in record.items() if key not in _ELSEWHERE}
    rest["dataset"] = {key: value for key, value in rest["dataset"].items() if key != "notes"}
    _section("measured", {key: value for key, value in rest.items() if value is not None}, console)
    checks = record.get("audit", {}).get("checks", [])
    if checks:
        said = {True: "raised", False: "not raised", None: "not checked"}
        made = {each["name"]: f"{said[each['raised']]}: {each.get('why', '')}" for each in checks}
        _section("audit", made, console)
    _section("environment", record.get("environment", {}), console)
    _section("config", record["config"], console)


def _accuracies(record: Record) -> Table:
    table = Table()
    table.add_column("accuracy")
    for column in ("%", "95% interval", "n", "judge draws"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, key in _ACCURACIES:
        value = record[key]
        limits = f"{100 * value['low']:.2f} to {100 * value['high']:.2f}"
        counts = (str(record["n"]), str(record["judge_draws"]))
        table.add_row(name, f"{100 * value['value']:.2f}", limits, *counts)
    return table


def _show_metrics(record: Record, console: Console) -> None:
    metrics = record["metrics"]
    table = Table()
    table.add_column("class", overflow="fold")
    headings = ("robust", "precision", "recall", "F1")
    for column in (*headings, *(f"{name} att." for name in headings[1:])):
        table.add_column(column, justify="right")
    looks = (metrics["clean"], metrics["attacked"])
    names = record["dataset"].get("classes") or []
    for place, share in enumerate(metrics["robust_accuracy_per_class"]):
        figures = [look[key][place] for look in looks for key in ("precision", "recall", "f1")]
        name = str(names[place]) if place < len(names) else str(place)
        table.add_row(escape(name), *(_share(each) for each in (share, *figures)))
    macro = [look["macro"][key] for look in looks for key in ("precision", "recall", "f1")]
    table.add_row("mean", "", *map(_share, macro))
    print_title("by class, in %; att.: after the attack", console)
    console.print(table)
    for name, look in zip(("clean", "attacked"), looks, strict=True):
        area, sure = look["macro"]["roc_auc"], look["confidence"]
        told = f"{name}: ROC-AUC {_share(area)}, confidence {_share(sure['right'])} where right, "
        console.print(f"{told}{_share(sure['wrong'])} where wrong", highlight=False, soft_wrap=True)
        rows = "\n".join(" ".join(f"{count:4d}" for count in row) for row in look["confusion"])
        print_title(f"confusion, {name} (a row for each true class)", console)
        console.print(rows, highlight=False, soft_wrap=True)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _section(name: str, values: Mapping[str, Any], console: Console) -> None:
    """A part of the record as YAML."""
    from omegaconf import OmegaConf

    print_title(name, console)
    text = OmegaConf.to_yaml(OmegaConf.create({name: dict(values)}))
    console.print(escape(text.rstrip()), highlight=False, soft_wrap=True)

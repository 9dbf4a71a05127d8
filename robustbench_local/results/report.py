"""What a person sees of a finished run."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_local.results.store import Record


def show(record: Record, console: Console, *, leaderboard: Path, recorded: bool) -> None:
    """Print one finished run as a table, its doubts below it, and where to find more."""
    labels = record["labels"]
    title = (
        f"{labels['dataset']}: {labels['model']}, defense {labels['defense']}, {labels['norm']} "
        f"{record['config']['threat']['epsilon']}"
    )
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("attack", overflow="fold")
    for heading in ("clean", "robust", "95% interval", "n", "train s", "attack s"):
        table.add_column(heading, justify="right", no_wrap=True)
    robust, seconds = record["robust_accuracy"], record["seconds"]
    table.add_row(
        escape(labels["attack"]),
        _percent(record["clean_accuracy"]["value"]),
        _percent(robust["value"]),
        f"{100 * robust['low']:.2f} - {100 * robust['high']:.2f}",
        str(record["n"]),
        f"{seconds['training']:.1f}",
        f"{seconds['attack']:.1f}",
    )
    console.print(table)
    for sentence in doubts(record):
        console.print(f"[yellow]note[/yellow] {escape(sentence)}", soft_wrap=True)
    state = "recorded before, not run again (force=true runs it)" if recorded else "recorded"
    console.print(
        f"{state}: run {record['run_id']}; table: {escape(str(leaderboard))}", soft_wrap=True
    )


def doubts(record: Record) -> list[str]:
    """Every sentence of a record that a reader of its numbers should know."""
    flags = [f"{flag['name']}: {flag['why']}" for flag in record["flags"]]
    # The flag `subset` says what the note of the dataset says.
    notes = [note for note in record["dataset"]["notes"] if not note.startswith("subset:")]
    return [*notes, *record["weights"]["warnings"], *flags]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"

"""What a person sees of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_local.results.leaderboard import RANKING_ATTACKS, starred
from robustbench_local.results.store import Record


def show(
    records: Sequence[Record],
    console: Console,
    *,
    leaderboard: Path,
    recorded: int,
    said: set[str] | None = None,
) -> None:
    """Print the finished run as a table, a line for each epsilon, and its doubts below it.

    `recorded` of the records were there before. Notes that every run of a sweep has are left out
    where they are `said` already, and join that set.
    """
    said = set() if said is None else said
    labels = records[0]["labels"]
    radii = " ".join(_epsilon(record) for record in records)
    title = (
        f"{labels['dataset']}: {labels['model']}, defense {labels['defense']}, "
        f"{labels['norm']} {radii}"
    )
    if records[0].get("detection"):
        title += "; rejecting an attacked image counts as robust"
    table = Table()
    table.add_column("attack", overflow="fold")
    headings = ["clean", "robust", "95% interval", "n", "train s", "attack s"]
    if len(records) > 1:
        headings.insert(0, "epsilon")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        robust, seconds = record["robust_accuracy"], record["seconds"]
        cells = [
            _percent(record["clean_accuracy"]["value"]),
            _percent(robust["value"]),
            f"{100 * robust['low']:.2f} - {100 * robust['high']:.2f}",
            str(record["n"]),
            f"{seconds['training']:.1f}",
            f"{seconds['attack']:.1f}",
        ]
        if len(records) > 1:
            cells.insert(0, _epsilon(record))
        table.add_row(escape(record["labels"]["attack"]), *cells)
    print_title(title, console)
    console.print(table)
    _show_preparation(records, console)
    show_certificate(records[0], console)
    for record in records:
        _show_parts(record, console, several=len(records) > 1)
        _show_audit(record, console, several=len(records) > 1)
    notes = [note for record in records for note in (*doubts(record), *_provisional(record))]
    for sentence in dict.fromkeys(notes):
        if sentence not in said:
            console.print(f"[yellow]note[/yellow] {escape(sentence)}", soft_wrap=True)
    said.update(note for record in records for note in common_notes(record))
    if any(flag["severe"] for record in records for flag in record["flags"]):
        console.print("* a severe flag: it withholds the rank", soft_wrap=True)
    state = "recorded" if recorded == 0 else f"{recorded} of {len(records)} recorded before"
    if recorded == len(records):
        state = "recorded before, not run again (force=true runs it)"
    run_ids = " ".join(record["run_id"] for record in records)
    console.print(f"{state}: run {run_ids}; table: {escape(str(leaderboard))}", soft_wrap=True)


def print_title(title: str, console: Console) -> None:
    """The title of a table, which rich itself would break to the width of a narrow one."""
    console.print(escape(title), style="bold", soft_wrap=True, highlight=False)


def _show_preparation(records: Sequence[Record], console: Console) -> None:
    """How long a user waited before the first image, where that is to be noticed."""
    # Radii that were prepared for at once have the very same figure; older records have none.
    seconds = sum({record["seconds"].get("preparation", 0.0) for record in records})
    if seconds > 1:
        console.print(
            f"preparation: {seconds:.1f} s before the first image (models trained to attack "
            "through, draws tried), not in attack s",
            soft_wrap=True,
        )


def show_certificate(record: Record, console: Console) -> None:
    """Accuracy that is proved, and only that is called certified."""
    proved = record.get("certified")
    if not proved:
        return
    heading = (
        f"certified accuracy, {proved['norm']}, n {proved['images']}, sigma {proved['sigma']:g}, "
        f"{proved['n']} votes, alpha {proved['alpha']:g}, {proved['abstained']} abstained"
    )
    table = Table()
    for column in ("radius", "certified", "95% interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for radius, share in proved["radii"].items():
        interval = f"{100 * share['low']:.2f} - {100 * share['high']:.2f}"
        table.add_row(radius, _percent(share["value"]), interval)
    print_title(heading, console)
    console.print(table)


def radius_in_words(epsilon: float) -> str:
    """A radius as people write it: 0.3, 0.5, and 8/255 where it is so many levels of a byte."""
    levels = round(255 * epsilon)
    if float(f"{epsilon:.4g}") != epsilon and abs(levels - 255 * epsilon) < 1e-6:
        return f"{levels}/255"
    return f"{epsilon:.4g}"


def _epsilon(record: Record) -> str:
    return radius_in_words(record["config"]["threat"]["epsilon"])


def _show_parts(record: Record, console: Console, *, several: bool) -> None:
    """What an attack reports beside accuracies: the parts of a cascade, or single figures."""
    report = dict(record["attack_report"])
    at = f", epsilon {_epsilon(record)}" if several else ""
    parts = report.pop("parts", None)
    if parts:
        heading = f"{record['labels']['attack']}, part by part, each on the survivors{at}"
        table = Table()
        table.add_column("part", overflow="fold")
        for column in ("attacked", "broken", "forward", "backward", "s"):
            table.add_column(column, justify="right", no_wrap=True)
        for part in parts:
            table.add_row(
                escape(part["name"]),
                *(str(part[key]) for key in ("attacked", "broken", "forward", "backward")),
                f"{part['seconds']:.1f}",
            )
        print_title(heading, console)
        console.print(table)
    averaged = record.get("eot")
    if averaged:
        console.print(_draws(averaged) + at, soft_wrap=True)
    figures = [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in report.items()]
    rate = record["target_success_rate"]
    if rate is not None:
        figures.append(f"reached the target class: {_percent(rate)} of the images attacked")
    detection = record.get("detection")
    if detection is not None:
        figures.append(_rejections(detection))
    for figure in figures:
        console.print(escape(figure + at), soft_wrap=True)


def _draws(averaged: Mapping[str, Any]) -> str:
    """How many draws of a random victim the attack averaged, and why so many."""
    tried = [
        f"{each['samples']} left {_percent(each['robust_accuracy'])}" for each in averaged["tried"]
    ]
    of = f" ({', '.join(tried)} of {averaged['tried'][0]['n']} images)" if tried else ""
    return f"draws of the random victim averaged: {averaged['samples']}{of}"


def _rejections(detection: Record) -> str:
    """How often a detector was right, in one sentence."""
    told = f"rejected: {_percent(detection['clean_rejected'])} of the clean images"
    for key, which in (
        ("attacked", "the attacked ones"),
        ("fooling", "those that fool the network"),
    ):
        if detection[f"{key}_rejected"] is not None:
            share, area = detection[f"{key}_rejected"], detection[f"{key}_roc_auc"]
            told += f", {_percent(share)} of {which} (ROC-AUC {area:.3f})"
    return told


def _show_audit(record: Record, console: Console, *, several: bool) -> None:
    """What every check found, where all were made."""
    audit = record.get("audit", {"level": "cheap"})  # older records have none
    if audit["level"] != "full":
        return
    at = f", epsilon {_epsilon(record)}" if several else ""
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("flag", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for check in audit["checks"]:
        raised = "raised, severe*" if check["severe"] else "raised, mild"
        flag = {True: raised, False: "not raised", None: "not checked"}[check["raised"]]
        table.add_row(check["name"], flag, escape(check["why"]))
    print_title(f"audit of {record['labels']['attack']}{at}", console)
    console.print(table)


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):  # the models of a transfer attack
        return ", ".join(f"{each['name']} ({each['sha256'][:8]})" for each in value)
    return str(value)


def _told(flag: Mapping[str, Any]) -> str:
    return f"{starred([flag])}: {flag['why']}"


def doubts(record: Record) -> list[str]:
    """Every sentence of a record that a reader of its numbers should know; a star: severe."""
    flags = [_told(flag) for flag in record["flags"]]
    learned = [told for about in record.get("learned", {}).values() for told in about["warnings"]]
    return [*_data_notes(record), *record["weights"]["warnings"], *learned, *flags]


def _data_notes(record: Record) -> list[str]:
    """Without that of a subset, since the flag says the same."""
    return [note for note in record["dataset"]["notes"] if not note.startswith("subset:")]


def common_notes(record: Record) -> list[str]:
    """Notes that do not tell one run of a sweep from another: about the data, and the rank."""
    subset = [_told(flag) for flag in record["flags"] if flag["name"] == "subset"]
    return [*_data_notes(record), *subset, *_provisional(record)]


def particular_notes(record: Record) -> dict[str, str]:
    """What went wrong in a run or its trainings: sentences by what they are about.

    Of flags the severe ones, other than what an attack brings with it that ignores the defense.
    """
    learned = [told for about in record.get("learned", {}).values() for told in about["warnings"]]
    known = record["labels"]["awareness"]
    severe = [flag for flag in record["flags"] if flag["severe"] and flag["name"] != known]
    told = {sentence: sentence for sentence in (*record["weights"]["warnings"], *learned)}
    return told | {flag["name"]: _told(flag) for flag in severe}


def _provisional(record: Record) -> list[str]:
    """That the attack ranks no row of the leaderboard, and which one does if any can."""
    labels = record["labels"]
    if labels["attack"] in RANKING_ATTACKS or labels["awareness"] == "oblivious":
        return []  # the flag of an oblivious attack says more
    threat = record["config"]["threat"]
    served = threat["norm"] in ("linf", "l2", "l1") and threat["access"] == "gradients"
    if served and threat["query_budget"] is None:
        return ["provisional: this attack alone ranks no row; type attack=standard"]
    return ["provisional: no attack ranks a row under this threat model"]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"

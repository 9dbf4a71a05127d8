"""The leaderboard for a person to read, and to take along: in a terminal, a paper, a page."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_local.errors import UserError
from robustbench_local.results.finding import same_radius, unknown_value
from robustbench_local.results.leaderboard import ROW
from robustbench_local.results.lines import ENDS, MEASURES
from robustbench_local.results.report import print_title, radius_in_words

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("csv", "md", "latex", "json")

NARROW = 130
"""Columns of a terminal below which a victim and its figures stand below each other."""


def filtered(table: "pd.DataFrame", wanted: Mapping[str, str], where: str) -> "pd.DataFrame":
    """The lines with these labels; `attack` keeps those that have met it, and its columns alone.

    Raises `UserError` where no line has one of them.
    """
    for key, typed in wanted.items():
        if key == "attack":
            there = attacks_of(table)
            kept = table[table[typed].notna()] if typed in there else table[:0]
            drop = [f"{name}{end}" for name in there if name != typed for end in ENDS]
            kept = kept.drop(columns=drop)
        elif key == "epsilon":
            there = [radius_in_words(value) for value in sorted(table[key].unique())]
            kept = table[[same_radius(value, typed) for value in table[key]]]
        else:
            there = sorted(table[key].astype(str).unique())
            kept = table[table[key].astype(str) == typed]
        if kept.empty:
            raise UserError(_as_option(unknown_value(key, typed, there, where)))
        table = kept
    return table.reset_index(drop=True)


def _as_option(told: str) -> str:
    """A sentence with `key=value` to type, for options."""
    head, typed, rest = told.rpartition("type ")
    key, is_set, value = rest.partition("=")
    return f"{head}{typed}--{key} {value}" if is_set and typed else told


def attacks_of(table: "pd.DataFrame") -> list[str]:
    """The attacks that some line has met."""
    return [
        name
        for name in map(str, table.columns)
        if name not in MEASURES
        and {f"{name}_low", f"{name}_high"} <= set(table.columns)
        and table[name].notna().any()
    ]


def show_leaderboard(table: "pd.DataFrame", console: Console) -> None:
    """Print it, a table for each threat model and data set, best first."""
    attacks = attacks_of(table)
    groups = ["dataset", "comparability", "norm", "epsilon", "access", "awareness"]
    tables = [group for _, group in table.groupby(groups, sort=False)]
    titles = [_title(group.iloc[0]) for group in tables]
    for group, title in zip(tables, titles, strict=True):
        if titles.count(title) > 1:  # other test images, query budgets or rules of the judge
            title = f"{title}, comparability {group['comparability'].iloc[0]}"
        print_title(title, console)
        narrow = console.width < NARROW
        console.print(_narrow(group, attacks) if narrow else _wide(group, attacks))
    flags = " ".join(map(str, table["flags"].dropna()))
    told = "accuracies in %, worst case over the attacks with its 95% interval"
    console.print(told + ("; a star: a severe flag" if "*" in flags else ""), soft_wrap=True)


def _title(line: "pd.Series[Any]") -> str:
    return (
        f"{line['dataset']}, {line['norm']} {radius_in_words(line['epsilon'])}, access to "
        f"{line['access']}, {line['awareness']}, n {line['n']}"
    )


def _wide(group: "pd.DataFrame", attacks: Sequence[str]) -> Table:
    table = Table()
    for name in ("rank", "defense", "model", "train"):
        longest = max(
            len(part) for each in group[name] for part in _breaking(str(each)).split("\n")
        )
        # Rich would break the names of defenses within a word, to leave room for longer columns.
        table.add_column(name, overflow="fold", no_wrap=name == "defense" and longest <= 30)
    for name in ("clean", "worst case"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("attacks", "seeds", "status", "flags"):
        table.add_column(name, overflow="fold")
    for _, line in group.iterrows():
        cells = [_text(line["rank"])]
        cells += [_breaking(str(line[key])) for key in ("defense", "model", "train")]
        cells += [_share(line["clean_accuracy"]), _with_interval(line, "worst_case")]
        cells += [_met(line, attacks), _text(line["seeds"]), _status(line)]
        table.add_row(*(escape(cell) for cell in (*cells, _text(line["flags"]))))
    return table


def _narrow(group: "pd.DataFrame", attacks: Sequence[str]) -> Table:
    table = Table(show_lines=True)
    table.add_column("victim", overflow="fold")
    table.add_column("accuracies", overflow="fold")
    for _, line in group.iterrows():
        victim = [f"{key} {_breaking(str(line[key]))}" for key in ("defense", "model", "train")]
        if _text(line["rank"]):
            victim.insert(0, f"rank {_text(line['rank'])}")
        about = {"seeds": line["seeds"], "status": _status(line), "flags": line["flags"]}
        victim += [f"{key} {value}" for key, value in about.items() if _text(value)]
        figures = [f"clean {_share(line['clean_accuracy'])}"]
        figures += [f"worst case {_with_interval(line, 'worst_case')}", _met(line, attacks)]
        table.add_row(escape("\n".join(victim)), escape("\n".join(figures)))
    return table


def _breaking(name: str) -> str:
    """A name of several parts, each on a line."""
    return name.replace("+", "\n+ ")


def _met(line: "pd.Series[Any]", attacks: Sequence[str]) -> str:
    return ", ".join(f"{name} {_share(line[name])}" for name in attacks if _text(line[name]))


def _text(value: object) -> str:
    """Empty where there is nothing."""
    import pandas as pd

    return "" if pd.isna(value) else str(value)  # type: ignore[call-overload]


def _status(line: "pd.Series[Any]") -> str:
    """With where the line comes from, unless its records are in this folder."""
    origin = line["origin"]
    return _text(line["status"]) + ("" if origin == "local" else f" ({origin})")


def _share(value: Any) -> str:
    return f"{100 * float(value):.1f}" if _text(value) else ""


def _with_interval(line: "pd.Series[Any]", name: str) -> str:
    if not _text(line[name]):
        return ""
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return f"{_share(line[name])} ({_share(low)} to {_share(high)})"


def exported(table: "pd.DataFrame", kind: str) -> str:
    """The leaderboard as text. CSV and JSON have every column, fractions as they are.

    Markdown and LaTeX (booktabs) have what people read, accuracies in % with their intervals, and
    their own special characters escaped.
    """
    if kind == "csv":
        return table.to_csv(index=False, lineterminator="\n")
    if kind == "json":
        lines = table.astype(object).where(table.notna(), None).to_dict("records")
        return json.dumps(lines, indent=1, allow_nan=False, default=lambda v: v.item()) + "\n"
    printed = _printed(table)
    if kind == "md":
        rows = [list(printed.columns), ["---"] * len(printed.columns), *printed.to_numpy().tolist()]
        marked = [[each if row is rows[1] else escape_markdown(each) for each in row]
                  for row in rows]  # fmt: skip
        return "".join(f"| {' | '.join(row)} |\n" for row in marked)
    for_latex = printed.map(escape_latex).rename(columns=escape_latex)
    return "% needs \\usepackage{booktabs}\n" + for_latex.to_latex(index=False, escape=False)


def _printed(table: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    columns = {"rank": table["rank"].map(_text)}
    for key in ROW:
        columns[key] = table[key].map(radius_in_words if key == "epsilon" else _text)
    for name in (*MEASURES, *attacks_of(table)):
        columns[name] = table.apply(_with_interval, axis=1, name=name)
    for key in ("n", "seeds"):
        columns[key] = table[key].map(_text)
    columns["status"] = table.apply(_status, axis=1)
    columns["flags"] = table["flags"].map(_text)
    return pd.DataFrame(columns, dtype=object)


def escape_markdown(text: str) -> str:
    """Text that stays what it is in a cell of a table; underscores within words are harmless."""
    escaped = re.sub(r"([\\`*|<>\[\]~#&])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped).replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}", '"': r"\textquotedbl{}",
    "[": "{[}", "]": "{]}", "-": "-{}", "*": "{*}", "\n": " ",
}  # fmt: skip
"""A bracket or a star at the beginning of a line would belong to the line break before it; two
hyphens would become a dash."""


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(letter, letter) for letter in text)

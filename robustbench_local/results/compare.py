"""Two or more victims on the same images: what differs, how sure that is, and a sentence to quote.

`comparison.py` is the table at the end of a sweep; this compares what a person names.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_local.errors import UserError
from robustbench_local.results.finding import VICTIM, Side, differing, side
from robustbench_local.results.leaderboard import starred
from robustbench_local.results.report import print_title, radius_in_words
from robustbench_local.results.statistics import Interval, Paired, holm, paired, seed_summary
from robustbench_local.results.store import Store
from robustbench_local.results.summary import warnings_of
from robustbench_local.results.worst_case import WorstCase, worst_interval


def compare(store: Store, words: Sequence[str], console: Console, *, anyway: bool = False) -> None:
    """Print the comparison of all pairs; `UserError` where they are not comparable.

    With `anyway`, attacks that know of the defense may stand beside those that do not, and worst
    cases over other attacks beside each other, with a note.
    """
    sides = [side(store, word) for word in words]
    notes = [note for pair in combinations(sides, 2) for note in _comparable(*pair, anyway=anyway)]
    notes += [_left_out(one) for one in sides if one.left_out]
    names = named(sides)
    results = [
        (one, two, _paired(sides[one], sides[two]))
        for one, two in combinations(range(len(sides)), 2)
    ]
    adjusted = holm([result.p_value for _, _, result in results])
    several = len(results) > 1
    print_title(f"{_where(sides)}: robust accuracy", console)
    console.print(_accuracies(sides, names))
    console.print(_differences(results, adjusted, console))
    for (one, two, result), p_value in zip(results, adjusted, strict=True):
        pair = (sides[one], sides[two])
        said = sentence(pair, result, p_value if several else None)
        console.print(f"\n{escape(said)}", soft_wrap=True, highlight=False)
    for note in dict.fromkeys([*notes, *_flags(sides, names)]):
        console.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True, highlight=False)


def _left_out(one: Side) -> str:
    seeds = ", ".join(map(str, one.left_out))
    if len(one.left_out) > 1:
        return f"seeds {seeds} have not met every attack of {one.word} and are left out"
    return f"seed {seeds} has not met every attack of {one.word} and is left out"


def _paired(one: Side, two: Side) -> Paired:
    return paired(one.outcomes, two.outcomes, draws=(one.draws, two.draws))


def _comparable(one: Side, two: Side, *, anyway: bool) -> list[str]:
    """Raise `UserError` where two sides were not held to the same standard; else what to note."""
    first, second = one.first, two.first
    pair = f"{one.word} and {two.word}"
    data, other_data = first["dataset"], second["dataset"]
    if data["test_fingerprint"] != other_data["test_fingerprint"] or not np.array_equal(
        one.indices, two.indices
    ):
        raise UserError(
            f"{pair} were measured on other test images ({first['n']:,} of "
            f"{first['labels']['dataset']}, {second['n']:,} of {second['labels']['dataset']}); "
            "expected the same: run one again with the data of the other, or type two others"
        )
    for key in ("norm", "epsilon", "access"):
        values = [record["labels"][key] for record in (first, second)]
        if values[0] != values[1]:
            shown = [radius_in_words(v) if key == "epsilon" else str(v) for v in values]
            raise UserError(
                f"{pair} differ in {key} ({shown[0]} and {shown[1]}); expected the same threat "
                f"model: type records of one {key}, such as {key}={shown[0]} in both"
            )
    budgets = [record["config"]["threat"].get("query_budget") for record in (first, second)]
    if budgets[0] != budgets[1]:
        raise UserError(
            f"{pair} differ in query_budget ({budgets[0]} and {budgets[1]}); expected the same "
            "threat model: type runs of one query_budget"
        )
    if bool(first.get("detection")) != bool(second.get("detection")):
        raise UserError(
            f"{pair} are held to other standards: one of them may reject images, which counts as "
            "robust; expected two that may, or two that may not: type two others"
        )
    notes = []
    awareness = [record["labels"]["awareness"] for record in (first, second)]
    if awareness[0] != awareness[1]:
        told = f"{pair} differ in awareness ({awareness[0]} and {awareness[1]})"
        if not anyway:
            raise UserError(
                f"{told}; expected the same: type --anyway to compare them none the less"
            )
        notes.append(f"{told}: an oblivious attack shows no robustness")
        if data.get("fingerprint") != other_data.get("fingerprint"):
            notes.append(f"{pair} were measured with other training data")
    elif first["comparability"] != second["comparability"]:
        raise UserError(
            f"{pair} were judged by other rules or on other training data (their comparability is "
            f"{first['comparability']} and {second['comparability']}); expected the same: run one "
            "of them again, or type two others"
        )
    if one.attacks != two.attacks and not all(_names_attack(each) for each in (one, two)):
        told = f"{pair} have met other attacks ({', '.join(one.attacks)}; {', '.join(two.attacks)})"
        common = sorted(set(one.attacks) & set(two.attacks))
        typed = f"type attack={common[0]} in both, or --anyway" if common else "type --anyway"
        if not anyway:
            raise UserError(f"{told}, so that their worst cases are not comparable; {typed}")
        notes.append(f"{told}: the worst case over more attacks is lower")
    return notes


def _names_attack(side: Side) -> bool:
    return "=" not in side.word or "attack=" in side.word


def named(sides: Sequence[Side]) -> list[str]:
    """What tells each side from the others, in few words; by their run ids where no label does."""
    keys = [key for key in (*VICTIM[1:], "awareness") if len(differing(sides, key)) > 1]
    names = []
    for one in sides:
        labels = one.first["labels"]
        parts = [str(labels["defense"])] if "defense" in keys or not keys else []
        parts += [f"{key} {labels[key]}" for key in keys if key != "defense"]
        if len({each.attacks for each in sides}) > 1:
            parts.append(f"under {_attack(one)}")
        names.append(" ".join(parts))
    if len(set(names)) < len(names):
        names = [f"{name} ({one.word})".strip() for name, one in zip(names, sides, strict=True)]
    return names


def _attack(side: Side) -> str:
    if len(side.attacks) == 1:
        return side.attacks[0]
    return f"the worst case of {', '.join(side.attacks)}"


def _where(sides: Sequence[Side]) -> str:
    labels = sides[0].first["labels"]
    where = f"{labels['dataset']}, {labels['norm']} {radius_in_words(labels['epsilon'])}"
    common = [
        f"{key} {labels[key]}"
        for key in (*VICTIM[1:], "awareness")
        if len(differing(sides, key)) == 1
    ]
    if len({side.attacks for side in sides}) == 1:
        common.append(f"attack {' '.join(sides[0].attacks)}")
    return f"{where}, {', '.join(common)}"


def robust(side: Side) -> Interval:
    """The accuracy of a side with its interval: of one seed that of the leaderboard."""
    if len(side.seeds) == 1:
        worst = WorstCase(side.outcomes[0], side.draws)
        return worst_interval(float(worst.images.mean()), [worst])
    summary = seed_summary(side.outcomes)
    return Interval(summary.mean, summary.low, summary.high)


def _accuracies(sides: Sequence[Side], names: Sequence[str]) -> Table:
    table = Table()
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("victim", overflow="fold")
    for column in ("robust", "95% interval", "n", "seeds"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, (one, name) in enumerate(zip(sides, names, strict=True), 1):
        value, low, high = robust(one)
        seeds = " ".join(map(str, one.seeds))
        cells = (percent(value), _limits(low, high), f"{one.outcomes.shape[1]}", seeds)
        table.add_row(str(number), escape(name), *cells)
    return table


def _differences(
    results: Sequence[tuple[int, int, Paired]],
    adjusted: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]],
    console: Console,
) -> Table:
    """A line for each pair, by the numbers of the victims: two names would leave no room."""
    table = Table()
    table.add_column("pair", no_wrap=True)
    headings = ["points", "95% interval", "only first", "only second", "p"]
    headings += ["p (Holm)"] if len(results) > 1 else []
    for column in headings:
        table.add_column(column, justify="right", no_wrap=console.width >= 100)
    for (one, two, result), p_value in zip(results, adjusted, strict=True):
        cells = [
            f"{100 * result.difference:+.1f}",
            _limits(result.low, result.high),
            str(result.only_first),
            str(result.only_second),
            p_in_words(result.p_value).removeprefix("p = ").removeprefix("p "),
        ]
        if len(results) > 1:
            cells.append(p_in_words(p_value).removeprefix("p = ").removeprefix("p "))
        table.add_row(f"{one + 1} - {two + 1}", *cells)
    return table


def sentence(sides: tuple[Side, Side], result: Paired, adjusted: float | None = None) -> str:
    """All of a comparison in one sentence that can be quoted, in which only the two are named."""
    names = named(sides)
    first, second = (robust(one).value for one in sides)
    labels = sides[0].first["labels"]
    attack = "" if sides[0].attacks != sides[1].attacks else f" against {_attack(sides[0])}"
    points = 100 * result.difference
    more = "more" if points > 0 else "less" if points < 0 else "apart"
    low, high = sorted((100 * result.low, 100 * result.high))
    if points < 0:
        low, high = -high, -low
    exact = result.method == "exact McNemar"
    *over, last = result.over
    sources = f"{', '.join(over)} and {last}" if over else last
    test = "exact McNemar" if exact else f"t-test over {sources}"
    mostly = "" if exact else f" (in most {'seeds' if max(result.seeds) > 1 else 'draws'})"
    p_value = p_in_words(result.p_value)
    if adjusted is not None:
        p_value += f", after Holm {p_in_words(adjusted)}"
    seeds = "one training seed each, so nothing is said about training noise"
    if max(result.seeds) > 1:
        one, two = (f"{count} seed{'s' * (count > 1)}" for count in result.seeds)
        seeds = f"{one} of the first and {two} of the second"
        if min(result.seeds) == 1:
            seeds += ", which says nothing about the training noise of the one with one"
    return (
        f"On the same {result.images:,} images of {labels['dataset']}, under {labels['norm']} "
        f"{radius_in_words(labels['epsilon'])}{attack}, {names[0]} keeps {percent(first)} where "
        f"{names[1]} keeps {percent(second)}: {abs(points):.1f} points {more} (95% interval "
        f"{low:.1f} to {high:.1f}), {test} {p_value}; {result.only_first:,} images only the first "
        f"keeps, {result.only_second:,} only the second{mostly}; {seeds}."
    )


def p_in_words(p_value: float) -> str:
    """A p-value with its sign of relation: p < 1e-200, p = 3.2e-05, p = 0.04, p = 1."""
    if p_value < 1e-200:
        return "p < 1e-200"
    if p_value < 1e-3:
        return f"p = {p_value:.1e}"
    return f"p = {p_value:.2g}"


def percent(fraction: float) -> str:
    """With one digit behind the point, as in `99.5%`."""
    return f"{100 * fraction:.1f}%"


def _limits(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _flags(sides: Sequence[Side], names: Sequence[str]) -> list[str]:
    notes = []
    for one, name in zip(sides, names, strict=True):
        flags = starred(flag for record in one.all_records for flag in record["flags"])
        trainings = {name for record in one.all_records for name in warnings_of(record)}
        flags = " ".join(sorted({*flags.split(), *trainings}))
        if flags:
            notes.append(f"flags of {name}: {flags}" + ("; a star: severe" if "*" in flags else ""))
    return notes

"""Two records of one run side by side: which numbers agree, and what explains where they do not."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_local.evaluation import PerExample
from robustbench_local.results.store import Record

_NO_NUMBERS = frozenset(
    {"version", "run_id", "finished", "comparability", "labels", "seconds", "environment",
     "config", "examples_sha256", "examples_bytes", "leaderboard", "input_shape", "split_seed"}
)  # fmt: skip
"""Keys, anywhere in a record, that say when, where and how, and not what was measured."""

_MACHINE = ("device", "device_name", "threads", "system", "python", "packages")
"""Of the environment, what explains that sums are rounded otherwise. The code's commit does not."""

_SHARED_COST = "passes_per_attacked_image."
"""What radii that are attacked together spend on all of them."""

_INTERVAL = {None: "no", True: "no; within its interval", False: "no; NOT within its interval"}

_SHOWN = 12
"""Differences that are printed; the others are counted."""

Leaves = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A number that came out otherwise; `within` its interval, None where it has none."""

    name: str
    recorded: object
    now: object
    within: bool | None = None


@dataclass
class Outcome:
    """What making a record again has shown."""

    compared: int = 0
    differences: list[Difference] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    """What is not compared, since the record's radius was attacked together with others."""
    missing: list[str] = field(default_factory=list)
    """What the record has and this version does not write any more."""
    elsewhere: list[str] = field(default_factory=list)
    """How the machine or the packages differ."""
    code: list[str] = field(default_factory=list)
    """How the code differs."""

    @property
    def exact(self) -> bool:
        """Every number agrees to the last digit."""
        return not self.differences

    @property
    def within(self) -> bool:
        """Every number that has an interval lies within what was recorded."""
        return all(difference.within is not False for difference in self.differences)

    @property
    def exit_code(self) -> int:
        """0 where all agrees, or lies within the intervals on another machine or other packages."""
        return 0 if self.exact or (self.within and self.elsewhere) else 1


def compare_records(
    recorded: Record,
    again: Record,
    examples: PerExample,
    new_examples: PerExample,
    *,
    alone: bool = False,
) -> Outcome:
    """Number by number, and image by image. What one of the two does not say is not compared.

    Nor is, where the radius was attacked `alone` now and with others then, what they cost together.
    """
    outcome = Outcome()
    old, new = leaves(recorded), leaves(again)
    for name, value in old.items():
        if name not in new:
            if _is_null(name, new):
                outcome.compared += 1
                outcome.differences.append(Difference(name, value, None))
            else:
                outcome.missing.append(name)
            continue
        if alone and (name == "radii_at_once" or name.startswith(_SHARED_COST)):
            outcome.alone.append(name)
            continue
        outcome.compared += 1
        if new[name] != value:
            within = _within(name, old, new)
            outcome.differences.append(Difference(name, value, new[name], within))
    theirs = asdict(new_examples)
    for name, values in asdict(examples).items():
        if not values.size:
            continue  # an older record, or nothing that this victim has
        outcome.compared += 1
        if not np.array_equal(values, theirs[name]):
            count = _images(values, theirs[name])
            outcome.differences.append(
                Difference(f"examples.{name}", f"n {len(values)}", f"differs in {count} images")
            )
    here, there = again.get("environment", {}), recorded.get("environment", {})
    outcome.elsewhere = list(_unlike({key: there.get(key) for key in _MACHINE},
                                     {key: here.get(key) for key in _MACHINE}))  # fmt: skip
    own = ("robustbench_local", "git_commit", "git_dirty")
    outcome.code = list(_unlike({key: there.get(key) for key in own},
                                {key: here.get(key) for key in own}))  # fmt: skip
    return outcome


def _is_null(name: str, new: Leaves) -> bool:
    """Whether null stands now where the record has a number further within."""
    steps = name.split(".")
    return any(
        (place := ".".join(steps[:count])) in new and new[place] is None
        for count in range(1, len(steps))
    )


def leaves(node: object, place: str = "") -> Leaves:
    """Every number of a record, and every hash, by its place; what has a name, by that.

    Sentences are left out: they may be worded better since.
    """
    found: Leaves = {}
    if isinstance(node, Mapping):
        for key, child in node.items():
            if key not in _NO_NUMBERS:
                found |= leaves(child, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list):
        begun: set[str] = set()
        for index, child in enumerate(node):
            has_name = isinstance(child, Mapping) and isinstance(child.get("name"), str)
            # The parts of a cascade may have one name several times.
            step = f"{child['name']}" if has_name else str(index)
            step = step if step not in begun else f"{step}.{index}"
            begun.add(step)
            found |= leaves(child, f"{place}.{step}")
    elif node is None or isinstance(node, bool | int | float) or _is_hash(place):
        found[place] = node
    return found


def _is_hash(place: str) -> bool:
    last = place.rpartition(".")[2]
    return last in ("sha256", "fingerprint", "test_fingerprint")


def _within(name: str, old: Leaves, new: Leaves) -> bool | None:
    """Whether an accuracy lies in the interval recorded with it; None for what has none."""
    home, _, last = name.rpartition(".")
    if last in ("low", "high") and f"{home}.value" in old:
        return None  # the value is what is asked about
    limits = (old.get(f"{home}.low"), old.get(f"{home}.high"))
    if last != "value" or None in limits or new[name] is None:
        return None
    return bool(limits[0] <= new[name] <= limits[1])


def _images(old: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> object:
    if old.shape != new.shape:
        return f"shape, {old.shape} and {new.shape}: all"
    return int((old != new).reshape(len(old), -1).any(axis=1).sum())


def _unlike(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key, value in there.items():
        now = here.get(key)
        if isinstance(value, Mapping) and isinstance(now, Mapping):
            yield from _unlike(value, now)
        elif value != now:
            yield f"{key} {value} then, {now} now"


def tell(outcome: Outcome, record: Record, again: Record, console: Console) -> None:
    """Print both accuracies, what differs, what may explain it, and the verdict."""
    table = Table()
    table.add_column("number", overflow="fold")
    for column in ("recorded", "now", "agrees"):
        table.add_column(column, overflow="fold")
    differs = {difference.name for difference in outcome.differences}
    for key in ("clean_accuracy", "robust_accuracy"):
        value, now = record[key], again[key]["value"]
        interval = f" ({100 * value['low']:.2f} to {100 * value['high']:.2f})"
        inside = "within" if value["low"] <= now <= value["high"] else "NOT within"
        agrees = "exactly" if f"{key}.value" not in differs else f"no; {inside} its interval"
        cells = (f"{100 * value['value']:.2f}%{interval}", f"{100 * now:.2f}%", agrees)
        table.add_row(key.replace("_", " "), *cells)
    hidden = {"clean_accuracy.value", "robust_accuracy.value"}
    others = [each for each in outcome.differences if each.name not in hidden]
    for each in others[:_SHOWN]:
        cells = (each.name, str(each.recorded), str(each.now))
        table.add_row(*map(escape, cells), _INTERVAL[each.within])
    console.print(table)
    if len(others) > _SHOWN:
        console.print(f"and {len(others) - _SHOWN} more that differ", highlight=False)

    def say(told: str) -> None:
        console.print(escape(told), soft_wrap=True, highlight=False)

    if outcome.missing:
        say(f"not compared, since this version does not say it: {', '.join(outcome.missing)}")
    if outcome.alone:
        count = record["radii_at_once"]
        say(
            f"not compared, since it was attacked together with {count - 1} other radii, whose "
            f"records are not there: {', '.join(outcome.alone)}"
        )
    if outcome.elsewhere:
        say(f"machine and packages: {'; '.join(outcome.elsewhere)}")
    if outcome.code:
        say(f"code: {'; '.join(outcome.code)}")
    if again["run_id"] != record["run_id"]:
        say(f"its run id would be {again['run_id']} now: code, data or device are not the same")
    if again["comparability"] != record["comparability"]:
        say(
            f"its comparability would be {again['comparability']} now: data, threat model or the "
            "rules of the judge are not the same, and no ranking holds both"
        )
    say(_verdict(outcome))


def _verdict(outcome: Outcome) -> str:
    count = f"{outcome.compared:,} numbers and arrays"
    if outcome.exact:
        return f"REPRODUCED: all {count} agree to the last digit"
    told = f"{len(outcome.differences):,} of {count} differ"
    if not outcome.within:
        return f"NOT REPRODUCED: {told}, and an accuracy lies outside its recorded interval"
    if outcome.elsewhere:
        return (
            f"REPRODUCED WITHIN THE INTERVALS: {told}, as happens on another machine or with other "
            "packages; every accuracy lies within its recorded interval"
        )
    return (
        f"NOT REPRODUCED: {told} on the same kind of machine with the same packages, although "
        "every accuracy lies within its recorded interval"
    )

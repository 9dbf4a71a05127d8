"""The records that a command line means: by the beginning of a run id, a file, or their labels."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustbench_local.errors import UserError
from robustbench_local.results.lines import latest_runs, strongest
from robustbench_local.results.report import radius_in_words
from robustbench_local.results.statistics import Draws
from robustbench_local.results.store import Record, Store
from robustbench_local.results.summary import ROW, summarise
from robustbench_local.results.worst_case import worst_case

KEYS = (*ROW, "attack", "seed")
"""What a selection may name."""

VICTIM = ("dataset", "model", "train", "defense")
"""What a selection must come down to one of; `norm`, `epsilon`, ... are part of comparability."""


@dataclass(frozen=True)
class Side:
    """One victim of a comparison: its records by seed, and what became of each image."""

    word: str
    records: Mapping[int, Sequence[Record]]
    outcomes: NDArray[np.float64]  # (seeds, images), the worst case over the attacks
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    draws: Draws  # of a random victim of one seed
    left_out: Sequence[int]  # seeds that have not met every attack

    @property
    def first(self) -> Record:
        """One record, for what all have in common."""
        return next(iter(self.records.values()))[0]

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks that every seed has met."""
        return tuple(sorted(record["labels"]["attack"] for record in self.records[self.seeds[0]]))

    @property
    def seeds(self) -> list[int]:
        """In rising order."""
        return sorted(self.records)

    @property
    def all_records(self) -> list[Record]:
        """Those of every seed."""
        return [record for seed in self.seeds for record in self.records[seed]]


def one_record(store: Store, word: str) -> Record:
    """The record whose run id begins with `word`; `UserError` where none or several do."""
    ids = sorted(path.stem for path in store.records.glob("*.json"))
    found = [run_id for run_id in ids if run_id.startswith(word)] if word else []
    if len(found) > 1 and word not in found:
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise UserError(
            f"{len(found)} runs begin with {word} ({shown}); expected one: type more of its id"
        )
    run_id = word if word in found else next(iter(found), None)
    record = store.find(run_id) if run_id else None
    if record is not None:
        return record
    if run_id:
        raise UserError(
            f"the record of run {run_id} is damaged and counts for nothing; run it again with the "
            "command that made it"
        )
    near = _near(word, ids)
    told = f"; near are {', '.join(near)}: type one of them" if near else ""
    raise UserError(
        f"no run in {store.folder} begins with {word or 'nothing'}"
        + (told or f"; expected a run id, as a run prints it: type ls {store.records}")
    )


def _near(word: str, ids: Sequence[str]) -> list[str]:
    """Run ids that may be meant: of the same length typed wrong, or beginning almost so."""
    beginnings = {run_id[: max(len(word), 4)]: run_id for run_id in reversed(ids)}
    return [beginnings[cut] for cut in difflib.get_close_matches(word, beginnings, 3, 0.7)]


def side(store: Store, word: str) -> Side:
    """What `word` selects: one run, or one victim by `key=value,key=value`."""
    if "=" not in word:
        record = one_record(store, word)
        return _side(store, word, {record["seed"]: [record]}, [])
    wanted = _wanted(word)
    records = [record for record in store.all() if fits(record, wanted)]
    if not records:
        raise UserError(_nothing(store, word, wanted))
    _refuse_several(word, records)
    counted = _counted(word, records)
    left_out = sorted({record["seed"] for record in records} - counted.keys())
    return _side(store, word, counted, left_out)


def fits(record: Record, wanted: Mapping[str, str]) -> bool:
    """Whether a record has these labels; a radius may be written as 8/255."""
    return all(_same(key, _value(record, key), value) for key, value in wanted.items())


def _value(record: Record, key: str) -> Any:
    return record["seed"] if key == "seed" else record["labels"].get(key)


def _shown(record: Record, key: str) -> str:
    """As people write it, and may type it."""
    value = _value(record, key)
    return radius_in_words(value) if key == "epsilon" else str(value)


def _same(key: str, value: object, typed: str) -> bool:
    if key == "epsilon":
        return same_radius(value, typed)
    return str(value) == typed


def same_radius(value: Any, typed: str) -> bool:
    """Whether a radius is the one that was typed, 0.3 or 8/255. What is none is no radius's."""
    from robustbench_local.threat import parse_epsilon

    try:
        return bool(np.isclose(parse_epsilon(value), parse_epsilon(typed), rtol=1e-6, atol=0))
    except UserError:
        return False


def _wanted(word: str) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for part in re.split(r",(?=\w+=)", word):  # names of runs may hold commas
        key, is_set, value = part.partition("=")
        if not is_set or key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            raise UserError(
                f"{part} selects nothing; expected key=value with one of {', '.join(KEYS)}: type "
                f"{near[0] if near else 'defense'}={value or 'NAME'}"
            )
        wanted[key] = value
    return wanted


def _nothing(store: Store, word: str, wanted: Mapping[str, str]) -> str:
    """Which key no record has, and what is near."""
    records = list(store.all())
    for key, value in wanted.items():
        there = sorted({_shown(record, key) for record in records})
        if not any(fits(record, {key: value}) for record in records):
            return unknown_value(key, value, there, str(store.folder))
    return (
        f"{word} selects no record of {store.folder}, although each part of it selects some; "
        "expected labels of one record: type fewer of them"
    )


def unknown_value(key: str, value: str, there: Sequence[str], where: str) -> str:
    """The sentence for a label that no record has."""
    if not there:
        return f"{where} holds no records; run something, or type --results DIR"
    near = difflib.get_close_matches(value, there, 1, 0.3)
    shown = ", ".join(there[:12]) + (", ..." if len(there) > 12 else "")
    return (
        f"{key}={value} is in no record of {where}; expected one of {shown}: type "
        f"{key}={near[0] if near else there[0]}"
    )


def _refuse_several(word: str, records: Sequence[Record]) -> None:
    """Raise `UserError` unless the records are those of one victim under comparable attacks."""
    for key in (*VICTIM, "norm", "epsilon", "access", "awareness"):
        values = sorted({_shown(record, key) for record in records})
        if len(values) > 1:
            raise UserError(
                f"{word} selects records that differ in {key} ({', '.join(values[:6])}); expected "
                f"one victim: type {word},{key}={values[0]}"
            )
    keys = sorted({str(record["comparability"]) for record in records})
    if len(keys) > 1:
        example = next(record["run_id"] for record in records)
        raise UserError(
            f"{word} selects records on other test images, query budgets or by other judges; "
            f"expected comparable ones: type the run id of one, such as {example}"
        )


def _counted(word: str, records: Sequence[Record]) -> dict[int, list[Record]]:
    """For each seed the strongest run of each attack on its latest weights, as in the leaderboard.

    Seeds count that have met every attack.
    """
    by_id = {record["run_id"]: record for record in records}
    met = latest_runs([summarise(record) for record in records])
    attacks = {attack for of in met.values() for attack in of}
    complete = {seed: of for seed, of in met.items() if of.keys() == attacks}
    if not complete:
        raise UserError(
            f"{word} selects seeds of which none has met every attack ({', '.join(sorted(attacks))}"
            f"); expected one at least: type {word},attack={min(attacks)}"
        )
    return {
        seed: [by_id[strongest(of[attack]).run_id] for attack in sorted(of)]
        for seed, of in complete.items()
    }


def _side(
    store: Store, word: str, records: Mapping[int, Sequence[Record]], left_out: Sequence[int]
) -> Side:
    examples = [store.examples(each["run_id"]) for same in records.values() for each in same]
    places = [(each.indices, each.labels) for each in examples]
    indices, labels = places[0]
    for other, _ in places[1:]:
        if not np.array_equal(other, indices):
            raise UserError(
                f"{word} selects records on other test images; expected the same: type a run id"
            )
    worst = [worst_case(store, list(map(summarise, records[seed]))) for seed in sorted(records)]
    outcomes = np.array([seed.images for seed in worst], np.float64)
    return Side(word, records, outcomes, indices, labels, worst[0].draws, left_out)


def differing(sides: Iterable[Side], key: str) -> list[Any]:
    """The distinct values of one label of the sides, in order."""
    return list(dict.fromkeys(_value(side.first, key) for side in sides))

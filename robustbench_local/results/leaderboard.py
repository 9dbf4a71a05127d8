"""The leaderboard: folded from the records, never edited, replaced as a whole."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from robustbench_local.files import atomic_path, remove_leftovers
from robustbench_local.results.statistics import Interval, wilson
from robustbench_local.results.store import Record, Store

RANKING_ATTACKS = frozenset({"standard", "autoattack"})
"""A row is ranked only with one of these among its attacks; PGD alone is provisional."""

ROW = ("dataset", "model", "train", "defense", "norm", "epsilon", "access", "awareness")
"""What names a line of the leaderboard, beside its comparability key."""

_ENDS = ("", "_low", "_high")


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


def fold(store: Store) -> pd.DataFrame:
    """One line per (dataset, model, training, defense, threat, awareness), best first.

    Sorted by worst case within a comparability key. Accuracies are fractions with their 95%
    limits; an attack that the line has not met is empty.
    """
    records = list(store.all())
    rows: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        labels = record["labels"]
        rows[(record["comparability"], *(str(labels[key]) for key in ROW))].append(record)
    attacks = sorted({record["labels"]["attack"] for record in records})
    measures = ["clean_accuracy", "worst_case", *attacks]
    columns = [*ROW, "status", *(f"{measure}{end}" for measure in measures for end in _ENDS)]
    columns += ["n", "seeds", "flags", "comparability", "run_ids"]
    table = pd.DataFrame([_line(store, row) for row in rows.values()], columns=columns)
    return table.sort_values(
        ["dataset", "comparability", "worst_case", "clean_accuracy", "model", "defense", "train"],
        ascending=[True, True, False, False, True, True, True],
        ignore_index=True,
    )


def _line(store: Store, records: list[Record]) -> dict[str, object]:
    """Everything known about one defended model under one threat model.

    An attack run twice with the same seed counts once, the latest. Seeds are averaged; the limits
    stay those of one test set. The worst case is per example over the attacks that every seed has
    met, then averaged.
    """
    cells = {}
    for record in sorted(records, key=lambda record: str(record["finished"])):
        cells[record["labels"]["attack"], record["seed"]] = record
    seeds = sorted({seed for _, seed in cells})
    attacks = sorted({attack for attack, _ in cells})
    shared = [attack for attack in attacks if all((attack, seed) in cells for seed in seeds)]
    first = records[0]
    line: dict[str, object] = {key: first["labels"][key] for key in ROW}
    line |= {"n": first["n"], "comparability": first["comparability"]}
    line["seeds"] = " ".join(map(str, seeds))
    line["run_ids"] = " ".join(sorted(record["run_id"] for record in cells.values()))

    flags = {flag["name"]: flag["severe"] for cell in cells.values() for flag in cell["flags"]}
    line["flags"] = " ".join(sorted(flags))
    withheld = any(flags.values())
    ranked = not RANKING_ATTACKS.isdisjoint(attacks)
    line["status"] = "withheld" if withheld else "ranked" if ranked else "provisional"

    def put(measure: str, per_seed: list[float]) -> None:
        value = float(np.mean(per_seed))
        interval: Interval = wilson(value * first["n"], first["n"])
        line.update(zip((f"{measure}{end}" for end in _ENDS), interval, strict=True))

    put("clean_accuracy", [_of_seed(cells, seed, "clean_accuracy") for seed in seeds])
    for attack in attacks:
        met = [cells[attack, seed] for seed in seeds if (attack, seed) in cells]
        put(attack, [record["robust_accuracy"]["value"] for record in met])
    if shared:
        put("worst_case", [_worst_case(store, cells, seed, shared) for seed in seeds])
    return line


def _of_seed(cells: dict[tuple[str, int], Record], seed: int, measure: str) -> float:
    return next(
        float(record[measure]["value"]) for (_, own), record in cells.items() if own == seed
    )


def _worst_case(
    store: Store, cells: dict[tuple[str, int], Record], seed: int, attacks: list[str]
) -> float:
    outcomes = [store.examples(cells[attack, seed]["run_id"]) for attack in attacks]
    for other in outcomes[1:]:
        if not np.array_equal(other.indices, outcomes[0].indices):
            raise RuntimeError("records with one comparability key hold different test images")
    return float(np.min([outcome.robust_correct for outcome in outcomes], axis=0).mean())

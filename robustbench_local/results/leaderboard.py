"""The leaderboard: folded from the records, never edited, replaced as a whole."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from robustbench_local.evaluation.audit import OF_THE_ATTACK
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

    Of an attack run twice with the same seed the latest counts, and of a seed only what was
    measured on its latest weights. The seeds that have met every attack of the line count, and are
    averaged; while none has, all do, `worst_case` is that of the worst seed, and the line is
    `incomplete`. So `worst_case`, per example over the attacks of a seed and then averaged, is
    never above any attack's column. The limits stay those of one test set.
    """
    cells: dict[int, dict[str, Record]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: str(record["finished"])):
        met = cells[record["seed"]]
        weights = record["weights"]["sha256"]
        if any(other["weights"]["sha256"] != weights for other in met.values()):
            met.clear()
        met[record["labels"]["attack"]] = record
    attacks = sorted({attack for met in cells.values() for attack in met})
    complete = {seed: met for seed, met in cells.items() if len(met) == len(attacks)}
    counted = complete or cells
    used = [record for met in counted.values() for record in met.values()]

    first = used[0]
    line: dict[str, object] = {key: first["labels"][key] for key in ROW}
    line |= {"n": first["n"], "comparability": first["comparability"]}
    line["seeds"] = " ".join(map(str, sorted(counted)))
    line["run_ids"] = " ".join(sorted(record["run_id"] for record in used))
    severe = {flag["name"] for record in used for flag in record["flags"] if flag["severe"]}
    names = {flag["name"] for record in used for flag in record["flags"]}
    line["flags"] = " ".join(sorted(names))
    ranking = [record for record in used if record["labels"]["attack"] in RANKING_ATTACKS]
    withheld = any(not _answers(ranking, name) for name in severe)
    line["status"] = _status(ranking=bool(ranking), complete=bool(complete), withheld=withheld)

    def put(measure: str, value: float) -> None:
        interval: Interval = wilson(value * first["n"], first["n"])
        line.update(zip((f"{measure}{end}" for end in _ENDS), interval, strict=True))

    clean = [next(iter(met.values()))["clean_accuracy"]["value"] for met in counted.values()]
    put("clean_accuracy", float(np.mean(clean)))
    for attack in attacks:
        met_by = [met[attack] for met in counted.values() if attack in met]
        put(attack, float(np.mean([record["robust_accuracy"]["value"] for record in met_by])))
    worst = [worst_case(store, list(met.values())) for met in counted.values()]
    put("worst_case", float(np.mean(worst) if complete else np.min(worst)))
    return line


def _answers(ranking: Sequence[Record], name: str) -> bool:
    """Whether a doubt is about one attack, and another that ranks the row does not have it."""
    return name in OF_THE_ATTACK and any(
        all(flag["name"] != name for flag in record["flags"]) for record in ranking
    )


def _status(*, ranking: bool, complete: bool, withheld: bool) -> str:
    if withheld:
        return "withheld"
    if not complete:
        return "incomplete"
    return "ranked" if ranking else "provisional"


def worst_case(store: Store, records: Sequence[Record]) -> float:
    """Per example over the attacks, then averaged; never above the strongest attack's mean.

    Of a random victim the least of several noisy shares is luck, which would grow with every attack
    added: the attack of each image is chosen on one half of the judge's draws and scored on the
    other, and the other way round. Where no two draws of each attack are recorded, the strongest
    attack's mean stands.
    """
    outcomes = [store.examples(record["run_id"]) for record in records]
    for other in outcomes[1:]:
        if not np.array_equal(other.indices, outcomes[0].indices):
            raise RuntimeError("records with one comparability key hold different test images")
    robust = np.array([outcome.robust_correct for outcome in outcomes])
    # Records from before it was told have several draws of random victims only.
    if not any(record.get("randomized", record["judge_draws"] > 1) for record in records):
        return float(robust.min(axis=0).mean())
    strongest = float(robust.mean(axis=1).min())
    if any(outcome.robust_draws.shape[1] < 2 for outcome in outcomes):
        return strongest
    even, odd = (
        np.array([outcome.robust_draws[:, first::2].mean(axis=1) for outcome in outcomes])
        for first in (0, 1)
    )
    images = np.arange(robust.shape[1])
    crossed = (odd[even.argmin(axis=0), images] + even[odd.argmin(axis=0), images]) / 2
    return min(strongest, float(crossed.mean()))

"""The leaderboard: folded from the records, never edited, replaced as a whole."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from robustbench_local.evaluation.audit import OF_THE_ATTACK
from robustbench_local.files import atomic_path, remove_leftovers
from robustbench_local.results.statistics import Interval, wilson
from robustbench_local.results.store import Record, Store

if TYPE_CHECKING:
    import pandas as pd

RANKING_ATTACKS = frozenset({"standard", "autoattack"})
"""A row is ranked only with one of these among its attacks; PGD alone is provisional."""

ROW = ("dataset", "model", "train", "defense", "norm", "epsilon", "access", "awareness")
"""What names a line of the leaderboard, beside its comparability key."""

_ENDS = ("", "_low", "_high")

_SAMPLE_SIZES = frozenset(
    {"images", "passes", "sample", "black_box_queries", "noise_draws", "frozen_images"}
)
"""Settings of an audit of which more is closer."""


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


def fold(store: Store) -> "pd.DataFrame":
    """One line per (dataset, model, training, defense, threat, awareness), best first.

    Sorted by worst case within a comparability key. Accuracies are fractions with their 95%
    limits; an attack that the line has not met is empty.
    """
    import pandas as pd  # not at the top: a run that is refused does without

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

    - Of a seed counts what was measured on its latest weights (`victim_of`).
    - Of an attack run again the latest counts, but weaker evidence replaces nothing: of runs with
      other draws of a random victim the lowest robust accuracy counts (`strongest`), and a flag of
      any of them stands until its check finds nothing (`_standing`).
    - The seeds that have met every attack of the line count, and are averaged; while none has, all
      do, `worst_case` is that of the worst seed, and the line is `incomplete`. So `worst_case`, per
      example over the attacks of a seed and then averaged, is never above any attack's column. The
      limits stay those of one test set, the widest of any seed.
    """
    runs = _runs(records)
    attacks = sorted({attack for met in runs.values() for attack in met})
    complete = {seed: met for seed, met in runs.items() if len(met) == len(attacks)}
    counted = complete or runs
    cells = {
        seed: {attack: strongest(same) for attack, same in met.items()}
        for seed, met in counted.items()
    }
    used = [record for cell in cells.values() for record in cell.values()]
    doubts = [
        doubt for met in counted.values() for same in met.values() for doubt in _standing(same)
    ]

    first = used[0]
    line: dict[str, object] = {key: first["labels"][key] for key in ROW}
    line |= {"n": first["n"], "comparability": first["comparability"]}
    line["seeds"] = " ".join(map(str, sorted(counted)))
    behind = [*used, *(doubt.record for doubt in doubts if doubt.flag["severe"])]
    line["run_ids"] = " ".join(sorted({record["run_id"] for record in behind}))
    line["flags"] = starred(doubt.flag for doubt in doubts)
    ranking = any(record["labels"]["attack"] in RANKING_ATTACKS for record in used)
    withheld = any(_is_withheld(met) for met in counted.values())
    line["status"] = _status(ranking=ranking, complete=bool(complete), withheld=withheld)

    def put(measure: str, interval: Interval) -> None:
        line.update(zip((f"{measure}{end}" for end in _ENDS), interval, strict=True))

    put("clean_accuracy", _mean([next(iter(c.values()))["clean_accuracy"] for c in cells.values()]))
    for attack in attacks:
        met_by = [cell[attack] for cell in cells.values() if attack in cell]
        put(attack, _mean([record["robust_accuracy"] for record in met_by]))
    worst = [worst_case(store, list(cell.values())) for cell in cells.values()]
    value = float(np.mean(worst) if complete else np.min(worst))
    put("worst_case", wilson(value * first["n"], first["n"]))
    return line


def _mean(accuracies: Sequence[Mapping[str, float]]) -> Interval:
    """The mean over the seeds, with the limits of the seed whose interval is the widest."""
    mean = float(np.mean([each["value"] for each in accuracies]))
    widest = max(accuracies, key=lambda each: each["high"] - each["low"])
    moved = mean - widest["value"]
    return Interval(mean, max(0.0, widest["low"] + moved), min(1.0, widest["high"] + moved))


def _runs(records: Sequence[Record]) -> dict[int, dict[str, list[Record]]]:
    """For each seed and attack its runs on the latest weights of the seed, in order of time."""
    runs: dict[int, dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda record: str(record["finished"])):
        met = runs.setdefault(record["seed"], {})
        if any(victim_of(other[-1]) != victim_of(record) for other in met.values()):
            met.clear()
        met.setdefault(record["labels"]["attack"], []).append(record)
    return runs


def victim_of(record: Record) -> tuple[str, ...]:
    """The hashes of all weights: those of the network, and of what its defense learned itself."""
    learned = record.get("learned", {})
    return (record["weights"]["sha256"], *(learned[name]["sha256"] for name in sorted(learned)))


def strongest(runs: Sequence[Record]) -> Record:
    """What counts of one attack on one victim; `runs` are in order of time.

    The latest, unless runs differ in the draws of a random victim, by the judge or averaged by the
    attack, which no label names: then the lowest robust accuracy among the latest of each.
    """
    latest = {
        (record["judge_draws"], (record.get("eot") or {}).get("samples")): record for record in runs
    }
    return min(latest.values(), key=lambda record: float(record["robust_accuracy"]["value"]))


class _Doubt(NamedTuple):
    """A flag, and the record that raised it."""

    flag: Mapping[str, Any]
    record: Record


def _standing(runs: Sequence[Record]) -> list[_Doubt]:
    """The flags of one attack on one victim, run several times; in order of time.

    A flag stands until a later run makes the check as closely and finds nothing; a check that was
    left out takes nothing back. A severe finding is not replaced by a mild one.
    """
    standing: dict[str, _Doubt] = {}
    for record in runs:
        for name in _cleared(record):
            if name in standing and _looks_as_closely(record, standing[name].record):
                del standing[name]
        for flag in record["flags"]:
            if flag["severe"] or flag["name"] not in standing:
                standing[flag["name"]] = _Doubt(flag, record)
    return list(standing.values())


def _cleared(record: Record) -> set[str]:
    """The checks that were made and found nothing; records before version 4 do not say."""
    checks = record.get("audit", {}).get("checks", [])
    return {check["name"] for check in checks if check["raised"] is False}


def _looks_as_closely(later: Record, earlier: Record) -> bool:
    """Whether the audit of a run had the settings of an earlier one, or larger samples."""
    now, then = (record["config"].get("audit", {}) for record in (later, earlier))
    return all(
        now.get(key) == value or (key in _SAMPLE_SIZES and now.get(key, 0) > value)
        for key, value in then.items()
        if key != "level"
    )


def _is_withheld(met: Mapping[str, Sequence[Record]]) -> bool:
    """Whether a severe doubt about a seed, by its attacks, is unanswered.

    A doubt about one attack is answered by a ranking one that no severe flag doubts, and that was
    found free of this very doubt.
    """
    severe = {
        attack: {doubt.flag["name"] for doubt in _standing(runs) if doubt.flag["severe"]}
        for attack, runs in met.items()
    }
    trusted = [attack for attack in met if attack in RANKING_ATTACKS and not severe[attack]]
    cleared = {name for attack in trusted for record in met[attack] for name in _cleared(record)}
    return not set().union(*severe.values()) <= cleared & OF_THE_ATTACK


def starred(flags: Iterable[Mapping[str, Any]]) -> str:
    """The names of flags, each once, with a star where one of that name is severe."""
    severe: dict[str, bool] = {}
    for flag in flags:
        severe[flag["name"]] = severe.get(flag["name"], False) or flag["severe"]
    return " ".join(f"{name}*" if severe[name] else name for name in sorted(severe))


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

"""What a line of the leaderboard needs of a record, small enough to hold 100,000 of them."""

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from robustbench_local.evaluation.evaluate import PerExample
from robustbench_local.results.integrity import Record
from robustbench_local.results.statistics import Interval

if TYPE_CHECKING:
    from robustbench_local.results.store import Store

T = TypeVar("T")

ROW = ("dataset", "model", "train", "defense", "norm", "epsilon", "access", "awareness")
"""What names a line of the leaderboard, beside its comparability key."""

FOLDED = frozenset(
    {
        "version", "run_id", "finished", "comparability", "labels", "seed", "n", "clean_accuracy",
        "robust_accuracy", "accuracy_of_draws", "randomized", "judge_draws", "eot", "learned",
        "weights", "flags", "passes_per_attacked_image", "seconds", "leaderboard",
        "examples_sha256", "examples_bytes",
    }
)  # fmt: skip
"""The keys of a record that are read for its summary."""


class Packed(NamedTuple):
    """Whether each image was right after the attack in each draw, a bit each."""

    images: str  # hash of their positions in the test set
    draws: int
    bits: bytes


class Seen(NamedTuple):
    """What became of the n images of one run."""

    images: str
    robust: NDArray[np.float64]  # (n,), the share of draws that are right
    draws: NDArray[np.bool_]  # (n, draws); fewer than two columns say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run, as the leaderboard counts it."""

    run_id: str
    finished: str
    comparability: str
    row: tuple[Any, ...]  # the labels of `ROW`
    attack: str
    seed: int
    n: int
    clean: Interval
    robust: Interval
    randomized: bool
    judge_draws: int
    averaged: int | None  # draws of a random victim, by the attack
    victim: tuple[str, ...]
    flags: tuple[Mapping[str, Any], ...]  # name and severe
    warnings: tuple[str, ...]  # of the trainings, by name
    cleared: tuple[str, ...]  # the checks that were made and found nothing
    audit: Mapping[str, Any]  # its settings
    forward: float | None  # passes per attacked image
    training_seconds: float | None
    attack_seconds: float | None
    parameters: int | None
    packed: Packed | None


def summarise(record: Record, pool: dict[str, Any] | None = None) -> Summary:
    """`pool` keeps what many records have in common, so that it is there once."""
    pool = {} if pool is None else pool

    def shared(value: T) -> T:
        known: T = pool.setdefault(repr(value), value)
        return known

    told = record.get("leaderboard") or for_leaderboard(record, None)
    seconds, robust = record.get("seconds", {}), told["robust"]
    return Summary(
        run_id=record["run_id"],
        finished=str(record["finished"]),
        comparability=shared(record["comparability"]),
        row=shared(tuple(record["labels"][key] for key in ROW)),
        attack=shared(record["labels"]["attack"]),
        seed=record["seed"],
        n=record["n"],
        clean=_interval(record["clean_accuracy"]),
        robust=_interval(record["robust_accuracy"]),
        randomized=record.get("randomized", record["judge_draws"] > 1),
        judge_draws=record["judge_draws"],
        averaged=(record.get("eot") or {}).get("samples"),
        victim=shared(victim_of(record)),
        flags=shared(tuple({key: f[key] for key in ("name", "severe")} for f in record["flags"])),
        warnings=shared(tuple(warnings_of(record))),
        cleared=shared(tuple(told["cleared"])),
        audit=shared(told["audit"]),
        forward=record.get("passes_per_attacked_image", {}).get("forward"),
        training_seconds=seconds.get("training"),
        attack_seconds=seconds.get("attack"),
        parameters=record["weights"].get("parameters"),
        packed=robust and Packed(robust["images"], robust["draws"], b64decode(robust["bits"])),
    )


def victim_of(record: Record) -> tuple[str, ...]:
    """The hashes of all weights: those of the network, and of what its defense learned itself."""
    learned = record.get("learned", {})
    return (record["weights"]["sha256"], *(learned[name]["sha256"] for name in sorted(learned)))


def warnings_of(record: Record) -> list[str]:
    """The names of what went wrong in its trainings, such as validation_at_chance."""
    parts = (record["weights"], *record.get("learned", {}).values())
    told = [sentence for part in parts for sentence in part.get("warnings", ())]
    return sorted({sentence.partition(":")[0] for sentence in told})


def for_leaderboard(record: Record, examples: PerExample | None) -> dict[str, Any]:
    """What records say once more from version 5 on, in short, so that folding need read no more.

    `cleared`: the checks that were made and found nothing (records before version 4 do not say);
    `audit`: its settings; `robust`: the outcomes of `examples`, packed; null where they are no
    whole number of draws.
    """
    return {
        "cleared": sorted(
            check["name"]
            for check in record.get("audit", {}).get("checks", [])
            if check["raised"] is False
        ),
        "audit": record["config"].get("audit", {}),
        "robust": None if examples is None else _pack(examples),
    }


def seen(store: "Store", run: Summary) -> Seen:
    """The outcomes of a run, from its examples where its record does not hold them."""
    if run.packed is None:
        arrays = store.outcomes(run.run_id)
        robust = arrays["robust_correct"]
        draws = arrays.get("robust_draws", np.zeros((len(robust), 0), np.bool_))
        return Seen(_name(arrays["indices"]), robust, draws)
    images, count, packed = run.packed
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=run.n * count)
    draws = bits.reshape(run.n, count).view(np.bool_)
    robust = draws[:, 0].astype(np.float64) if count == 1 else draws.mean(axis=1)
    return Seen(images, robust, draws)


def _pack(examples: PerExample) -> dict[str, Any] | None:
    draws, robust = examples.robust_draws, examples.robust_correct
    if draws.shape[1] < 2:
        draws = robust[:, None] > 0.5
    if not np.array_equal(draws.mean(axis=1), robust):
        return None
    bits = b64encode(np.packbits(draws).tobytes()).decode()
    return {"images": _name(examples.indices), "draws": draws.shape[1], "bits": bits}


def _name(indices: NDArray[np.int64]) -> str:
    return sha256(indices.astype("<i8").tobytes()).hexdigest()[:16]


def _interval(accuracy: Mapping[str, float]) -> Interval:
    return Interval(accuracy["value"], accuracy["low"], accuracy["high"])

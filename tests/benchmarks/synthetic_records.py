"""Valid records by the thousand, of the size and shape of real ones, written faster than folded."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robustbench_local.evaluation import PerExample
from robustbench_local.results import Store
from robustbench_local.results.migration import RECORD_VERSION
from robustbench_local.results.statistics import accuracy

REAL = Path(__file__).parents[1] / "results" / "fixtures" / "version4" / "records"
IMAGES, DRAWS = 1000, 10
THREATS = [
    (dataset, norm, epsilon)
    for norm, radii in (("linf", (0.01, 0.03, 0.1)), ("l2", (0.25, 0.5, 1.0)))
    for epsilon in radii
    for dataset in ("mnist", "cifar10", "svhn", "gtsrb")
]
DEFENSES = ("none", "jpeg", "trades", "mart", "awp", "quantize", "noise_fusion", "rse")
RANDOM = ("noise_fusion", "rse")
SEEDS = (0, 1, 2)
ATTACKS = ("noise", "fgsm", "pgd", "apgd", "square", "standard")
OPEN = ("run_id", "comparability", "dataset", "model", "defense", "attack", "norm", "epsilon",
        "seed", "weights")  # fmt: skip
"""What tells the records of one variant apart."""


def write(folder: Path, count: int) -> None:
    """Write `count` records below the results folder; their examples are links to a few files.

    Lines have 18 records, six attacks on three seeds, and models are added as the count grows.
    """
    store, variants = Store(folder), Store(folder / "variants")
    store.records.mkdir(parents=True)
    known: dict[str, str] = {}
    for run in itertools.islice(_runs(), count):
        variant = f"{run['defense']}-{run['attack']}-{run['seed']}-{len(run['model']) % 3}"
        if variant not in known:
            known[variant] = _text_of(variants, variant, run)
        body = known[variant] % run
        checksum = hashlib.sha256(body.encode()).hexdigest()
        path = store.records / f"{run['run_id']}.json"
        path.write_text(f'{{"checksum": "{checksum}",\n{body}')
        os.link(variants.records / f"{variant}.npz", path.with_suffix(".npz"))


def _runs() -> Iterator[dict[str, Any]]:
    number = itertools.count()
    for model in itertools.count():
        for (dataset, norm, epsilon), defense, seed, attack in itertools.product(
            THREATS, DEFENSES, SEEDS, ATTACKS
        ):
            yield {
                "run_id": hashlib.sha256(b"%d" % next(number)).hexdigest()[:16],
                "comparability": f"{dataset}-{norm}-{epsilon}",
                "dataset": dataset,
                "model": f"net{model}",
                "defense": defense,
                "attack": attack,
                "norm": norm,
                "epsilon": epsilon,
                "seed": seed,
                "weights": f"{dataset}-{model}-{defense}-{seed}",
            }


def _text_of(variants: Store, variant: str, run: dict[str, Any]) -> str:
    """Record a variant through the store; its text without the checksum, open where runs differ."""
    (real,) = REAL.glob("*.json")
    record = json.loads(real.read_text())
    randomized = run["defense"] in RANDOM
    examples = _examples(variant, run, randomized=randomized)
    marks = {key: f"@{key}@" for key in OPEN}
    record |= {
        "version": RECORD_VERSION,
        "run_id": variant,
        "comparability": marks["comparability"],
        "seed": marks["seed"],
        "n": IMAGES,
        "labels": {**record["labels"], **{k: marks[k] for k in marks if k in record["labels"]}},
        "weights": {**record["weights"], "sha256": marks["weights"]},
        "clean_accuracy": accuracy(examples.clean_correct, examples.clean_draws)._asdict(),
        "robust_accuracy": accuracy(examples.robust_correct, examples.robust_draws)._asdict(),
        "randomized": randomized,
        "judge_draws": DRAWS if randomized else 1,
    }
    variants.add(record, examples)
    written = (variants.records / f"{variant}.json").read_text()
    body = written.partition("\n")[2].replace("%", "%%")
    body = body.replace(f'"run_id": "{variant}"', '"run_id": "@run_id@"')
    for key, mark in marks.items():
        quoted = key not in ("seed", "epsilon")
        body = body.replace(mark if quoted else f'"{mark}"', f"%({key})s")
    return body


def _examples(variant: str, run: dict[str, Any], *, randomized: bool) -> PerExample:
    """Images differ in difficulty: what one attack breaks, a stronger one mostly does too."""
    generator = np.random.default_rng(int(hashlib.sha256(variant.encode()).hexdigest()[:8], 16))
    hard = np.random.default_rng(0).random(IMAGES)
    strength = 0.1 + 0.1 * ATTACKS.index(run["attack"]) + 0.03 * DEFENSES.index(run["defense"])
    draws = hard[:, None] + generator.normal(0, 0.05, (IMAGES, DRAWS)) > strength
    robust = draws.mean(axis=1) if randomized else draws[:, 0].astype(float)
    labels = generator.integers(0, 10, IMAGES)
    said = generator.dirichlet(np.ones(10), IMAGES).astype(np.float16)
    several = draws if randomized else draws[:, :0]
    return PerExample(
        indices=np.arange(IMAGES),
        labels=labels,
        clean_correct=np.ones(IMAGES),
        robust_correct=robust,
        clean_prediction=labels,
        adversarial_prediction=np.where(robust > 0.5, labels, (labels + 1) % 10),
        attacked=np.ones(IMAGES, np.bool_),
        size=np.full(IMAGES, float(run["epsilon"])),
        target=np.full(IMAGES, -1),
        clean_probabilities=said,
        adversarial_probabilities=said,
        clean_draws=np.ones_like(several),
        robust_draws=several,
    )

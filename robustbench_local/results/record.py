"""What a record says: who it is, what was measured, and everything that decided it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robustbench_local.data import Dataset
from robustbench_local.evaluation.audit import Check, flags
from robustbench_local.evaluation.evaluate import Judging, Outcomes, PerExample
from robustbench_local.evaluation.judge import VERSION as JUDGE_VERSION
from robustbench_local.identity import (
    class_version,
    code_version,
    content_id,
    file_sha256,
    find_object,
)
from robustbench_local.results.environment import environment, library_versions
from robustbench_local.results.metrics import measure, measure_detection
from robustbench_local.results.statistics import accuracy
from robustbench_local.results.store import RECORD_VERSION, Record
from robustbench_local.sources import identify
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

if TYPE_CHECKING:
    from robustbench_local.training import Trained

_CODE = (
    "attacks", "data", "defenses", "evaluation", "models", "training",
    "building.py", "gradients.py", "networks.py", "oracle.py", "randomness.py", "rejection.py",
    "request.py", "run.py", "sources.py", "spatial.py", "threat.py",
)  # fmt: skip


AROUND = ("paths", "shard", "threads", "tracking")
"""Settings about where a run happens and who is told of it. How sums are rounded on a CPU depends
on its threads, which a record has in its environment; no number depends on the others."""


def run_identity(settings: Mapping[str, Any], data: Dataset, device: torch.device) -> str:
    """The name of a run: a hash of all that decides its numbers.

    The resolved configuration without `AROUND` and `force`; the content of the data, of a given
    checkpoint and of the models to transfer from in place of their paths; the kind of device; this
    package's code and that of every class from elsewhere that the configuration names; the versions
    of the attack libraries where one of them does the work, in the attack or in the defense.
    """
    decides = {key: value for key, value in settings.items() if key not in (*AROUND, "force")}
    decides["dataset"] = {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "test": data.test_fingerprint,
    }
    code = {name: _code_of(name) for name in sorted(set(_targets(settings)))}
    decides["device"] = device.type
    if _is_foreign({"attack": decides["attack"], "defense": decides["defense"]}):
        decides["libraries"] = library_versions()
    model = dict(decides["model"])
    if model.get("checkpoint"):
        model["checkpoint"] = _checkpoint_id(model["checkpoint"])
    attack = dict(decides["attack"])
    if isinstance(attack.get("sources"), list):
        cache = Path(str(settings["paths"]["cache"])).expanduser()
        attack["sources"] = [identify(str(name), cache) for name in attack["sources"]]
    decides |= {"model": model, "attack": attack}
    return content_id({**decides, "code": [code_version(*_CODE), code]})


def comparability(
    settings: Mapping[str, Any], data: Dataset, threat: ThreatModel, *, rejects: bool = False
) -> str:
    """Rows with different keys never share a ranking.

    A victim that `rejects` images is held to another standard: rejecting an attacked image counts
    as robust.
    """
    return content_id(
        {
            **({"rejection": True} if rejects else {}),
            "dataset": data.fingerprint,
            "test": data.test_fingerprint,
            "threat": {
                "norm": threat.norm,
                "epsilon": threat.epsilon,
                "access": threat.access,
                "query_budget": threat.query_budget,
            },
            "awareness": settings["awareness"],
            "judge": JUDGE_VERSION,
        }
    )


def make_record(
    *,
    run_id: str,
    settings: Mapping[str, Any],
    labels: Mapping[str, Any],
    data: Dataset,
    threat: ThreatModel,
    trained: "Trained",
    outcomes: Outcomes,
    report: Mapping[str, Any],
    preparation: Mapping[str, int],
    preparation_seconds: float,
    averaged: Mapping[str, Any] | None,
    calibration: Mapping[str, Any] | None,
    judging: Judging,
    certified: Mapping[str, Any] | None,
    learned: Mapping[str, Any],
    checks: Sequence[Check],
    device: torch.device,
) -> Record:
    """Everything about one finished run, as JSON holds it."""
    rejects = outcomes.examples.clean_rejected.size > 0
    return {
        "version": RECORD_VERSION,
        "run_id": run_id,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "comparability": comparability(settings, data, threat, rejects=rejects),
        "labels": dict(labels),
        "seed": settings["seed"],
        **measured(outcomes, threat.norm, data.num_classes, calibration or {}),
        "randomized": judging.randomized,
        "judge_draws": judging.draws,
        "learned": dict(learned),
        "certified": None if certified is None else dict(certified),
        "eot": None if averaged is None else dict(averaged),
        "preparation_passes": dict(preparation),
        "attack_report": dict(report),
        "seconds": {
            "training": trained.seconds,
            "preparation": preparation_seconds,
            "attack": outcomes.attack_seconds,
            "judge": outcomes.judge_seconds,
        },
        "flags": [asdict(check) for check in flags(checks)],
        "audit": {"level": settings["audit"]["level"], "checks": [asdict(c) for c in checks]},
        "dataset": {
            "name": data.name,
            "source": data.source,
            "fingerprint": data.fingerprint,
            "test_fingerprint": data.test_fingerprint,
            "test_total": data.test_total,
            "train": len(data.train),
            "validation": len(data.validation),
            "input_shape": list(data.input_shape),
            "classes": list(data.class_names),
            "notes": list(data.notes),
        },
        "weights": {
            "key": trained.key,
            "sha256": trained.sha256,
            "device": trained.device,
            "processes": trained.processes,
            "epoch": trained.epoch,
            "validation": trained.validation,
            "parameters": sum(weight.numel() for weight in trained.model.parameters()),
            "warnings": list(trained.warnings),
        },
        "environment": environment(device),
        "config": {key: value for key, value in settings.items() if key not in AROUND},
    }


def measured(
    outcomes: Outcomes, norm: Norm, classes: int, calibration: Mapping[str, Any]
) -> dict[str, Any]:
    """What a record says of the images that were attacked, and nothing else decides.

    `calibration` is what a detector says of itself.
    """
    examples = outcomes.examples
    clean, robust = examples.clean_correct.sum(), examples.robust_correct.sum()
    # Of a random victim what most draws say: single ones differ without any attack.
    broken = examples.attacked & (examples.clean_correct > 0.5) & (examples.robust_correct <= 0.5)
    sizes = examples.size[broken]
    detection = measure_detection(examples)
    return {
        "n": len(examples.labels),
        "clean_accuracy": accuracy(examples.clean_correct, examples.clean_draws)._asdict(),
        "robust_accuracy": accuracy(examples.robust_correct, examples.robust_draws)._asdict(),
        "accuracy_of_draws": _of_draws(examples),
        # Fresh draws of a random victim may be right about more images than the first ones were.
        "attack_success_rate": float(max(0, clean - robust) / clean) if clean else None,
        "target_success_rate": _target_success(examples),
        "perturbation": {
            "norm": norm,
            "images": int(broken.sum()),
            "mean": float(sizes.mean()) if len(sizes) else None,
            "median": float(np.median(sizes)) if len(sizes) else None,
            "max": float(sizes.max()) if len(sizes) else None,
        },
        "metrics": measure(examples, classes),
        "detection": None if detection is None else {**calibration, **detection},
        "passes_per_attacked_image": {
            "forward": outcomes.forward_passes,
            "backward": outcomes.backward_passes,
        },
        "radii_at_once": outcomes.radii_at_once,
        "batch_size": outcomes.batch_size,
    }


def _of_draws(examples: PerExample) -> dict[str, list[float]] | None:
    """The accuracy in each draw of the judge; None where there is one draw only."""
    if not examples.robust_draws.shape[1]:
        return None
    return {
        "clean": examples.clean_draws.mean(axis=0).tolist(),
        "robust": examples.robust_draws.mean(axis=0).tolist(),
    }


def _target_success(examples: PerExample) -> float | None:
    """The share of the attacked images, where there was a class to reach, that ended in it."""
    aimed = examples.attacked & (examples.target >= 0) & (examples.target != examples.labels)
    if not aimed.any():
        return None
    return float((examples.adversarial_prediction == examples.target)[aimed].mean())


def _code_of(name: str) -> str:
    try:
        return class_version(find_object(name))
    except Exception:  # whatever importing it raises: building it will tell the user
        return name


def _targets(node: object) -> Iterator[str]:
    """Every class from outside the package that the configuration names."""
    if isinstance(node, Mapping):
        name = node.get("_target_")
        if isinstance(name, str) and not name.startswith("robustbench_local."):
            yield name
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _targets(child)


def _is_foreign(node: object) -> bool:
    """Whether an attack or a part of a defense, or one inside it, is another library's."""
    if not isinstance(node, Mapping):
        return False
    name = node.get("_target_")
    if isinstance(name, str):
        try:
            if getattr(find_object(name), "foreign", False):
                return True
        except Exception:  # whatever importing it raises: building it will tell the user
            return False
    return any(_is_foreign(child) for child in node.values())


def _checkpoint_id(path: str) -> str:
    file = Path(str(path)).expanduser()
    return file_sha256(file) if file.is_file() else path

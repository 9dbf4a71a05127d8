"""Shards of an evaluation fold into the record that a run in one piece writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from robustbench_local.__main__ import CONF
from robustbench_local.errors import UserError
from robustbench_local.evaluation.shards import Shard
from robustbench_local.run import Choices, run

SMALL = (
    "+experiment=smoke", "model.width=2", "model.hidden=8", "train.epochs=1", "eot.sample=10",
    "dataset.test_size=50", "batch_size=10", "attack.steps=3", "device=cpu",
)  # fmt: skip
EITHER_WAY = ("finished", "seconds", "environment")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Weights are trained once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def evaluate(cache, tmp_path, monkeypatch):
    """Call `evaluate("attack=fgsm", to="one")`: a run whose results lie in a folder of that name.

    No files of a dataset are looked for.
    """

    def call(*words, to="split"):
        paths = [f"paths.{name}={tmp_path / name}" for name in ("data",)]
        paths += [f"paths.cache={cache}", f"paths.results={tmp_path / to}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", [*SMALL, *words, *paths], return_hydra_config=True)
        choices = dict(config.hydra.runtime.choices)
        config = compose_without_hydra(config)
        return run(config, Choices(choices, (CONF,)))

    return call


def compose_without_hydra(config):
    from omegaconf import OmegaConf, open_dict

    with open_dict(config):
        resolved = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return resolved


def written(folder):
    """All that is recorded, but for times and machines: the text in order, and the arrays."""
    found = {}
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text())
        for key in EITHER_WAY:
            assert record.pop(key)
        for part in record["attack_report"].get("parts", []):
            assert part.pop("seconds") >= 0
        found[path.stem] = json.dumps(record), path.with_suffix(".npz").read_bytes()
    return found


def parts(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.glob("shards/*/*/records/*.json"))


CASES = {
    "pgd": (),
    "target": ("attack.target=next", "attack.step_size=0.5"),
    "curve": ("threat.epsilon=[0,0.1,0.2]",),
    "budget": ("attack=square", "~attack.steps", "attack.queries=20", "threat.access=scores",
               "threat.query_budget=20"),
    "minimum norm": ("attack=fmn", "threat.epsilon=[0.1,0.3]"),
    "cascade": ("attack=standard", "~attack.steps"),
    "substitute": ("attack=substitute", "~attack.steps", "threat.access=labels"),
    "noise_fusion": ("defense=noise_fusion", "threat.epsilon=[0.1,0.2]", "judge_draws=3"),
    "rse": ("defense=rse", "judge_draws=3", "train.epochs=1"),
    "audit": ("defense=noise_fusion", "judge_draws=2", "audit=full", "audit.sample=20"),
    "detector": ("defense=feature_squeezing_detector",),
    "certificate": ("defense=randomized_smoothing", "threat=mnist_l2", "judge_draws=2"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_shards_fold_into_the_record_of_one_run(evaluate, tmp_path, case):
    evaluate(*CASES[case], to="one")
    order = ("3/3", "1/3", "2/3")
    for shard in order[:-1]:
        assert evaluate(*CASES[case], f"shard={shard}") == []
        assert written(tmp_path / "split") == {}
    finished = evaluate(*CASES[case], f"shard={order[-1]}")
    expected = written(tmp_path / "one")
    assert [record["run_id"] for record in finished] and {
        record["run_id"] for record in finished
    } == set(expected)
    found = written(tmp_path / "split")
    for run_id, (text, arrays) in expected.items():
        assert found[run_id][0] == text
        assert found[run_id][1] == arrays
    assert parts(tmp_path / "split") == []

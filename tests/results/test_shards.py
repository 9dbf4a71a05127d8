"""Shards of an evaluation fold into the record that a run in one piece writes."""

import json

import pytest
from hydra import compose, initialize_config_dir

from robustbench_local.__main__ import CONF
from robustbench_local.run import Choices, run

SMALL = (
    "+experiment=smoke", "model.width=2", "model.hidden=8", "train.epochs=1", "eot.sample=10",
    "dataset.test_size=35", "batch_size=10", "device=cpu",
)  # fmt: skip
PGD = ("attack.steps=3", "threat.epsilon=0.05")
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


STANDARD = tuple(
    f"attack.parts.{name}=3"
    for name in ("apgd_ce.steps", "apgd_dlr.steps", "apgd_t.steps", "fmn.steps", "square.queries")
)
CASES = {
    "pgd": ((*PGD, "attack.target=next"), 3),
    "curve": (("attack.steps=3", "threat.epsilon=[0,0.03,0.1]"), 3),
    "minimum norm": (("attack=fmn", "attack.steps=5", "threat.epsilon=[0.05,0.1]"), 2),
    "budget": (
        ("attack=square", "attack.queries=20", "threat.access=scores", "threat.query_budget=20"), 2
    ),
    "cascade": (("attack=standard", *STANDARD, "threat.epsilon=0.05"), 2),
    "substitute": (
        ("attack=substitute", "attack.seeds=20", "attack.rounds=2", "attack.epochs=1",
         "threat.access=labels"), 2
    ),
    "curve of a random victim": (
        ("defense=noise_fusion", "attack.steps=3", "threat.epsilon=[0.05,0.1]", "judge_draws=3"), 3
    ),
    "random layers": (("defense=rse", *PGD, "judge_draws=3"), 2),
    "substitute of a random victim": (
        ("defense=rse", "attack=substitute", "attack.seeds=20", "attack.rounds=2",
         "attack.epochs=1", "judge_draws=2"), 2
    ),
    "rejection": (("defense=feature_squeezing_detector", *PGD), 2),
}  # fmt: skip
SLOW = {
    "audit": (
        ("defense=noise_fusion", "defense.wrap.noise_fusion.eot_samples=2", *PGD, "judge_draws=2",
         "audit=full", "audit.sample=8", "audit.frozen_images=2", "audit.black_box_queries=5"), 2
    ),
    "certificate": (
        ("defense=randomized_smoothing", "defense.wrap.randomized_smoothing.n=100",
         "attack.steps=3", "threat=mnist_l2", "threat.epsilon=[0.1,0.2]", "judge_draws=2"), 2
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_shards_fold_into_the_record_of_one_run(evaluate, tmp_path, case):
    words, count = {**CASES, **SLOW}[case]
    expected = {record["run_id"] for record in evaluate(*words, to="one")}
    for number in [*range(2, count + 1), 1][:-1]:
        assert evaluate(*words, f"shard={number}/{count}") == []
        assert written(tmp_path / "split") == {}
        assert len(parts(tmp_path / "split")) == (number - 1) * len(expected)
    last = evaluate(*words, f"shard=1/{count}")
    assert {record["run_id"] for record in last} == expected
    one, split = (written(tmp_path / name) for name in ("one", "split"))
    assert split.keys() == one.keys() == expected
    for run_id in expected:
        assert split[run_id][0] == one[run_id][0]
        assert split[run_id][1] == one[run_id][1]
    assert parts(tmp_path / "split") == []

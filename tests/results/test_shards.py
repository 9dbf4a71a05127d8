"""Shards of an evaluation fold into the record that a run in one piece writes."""

import json
import os
import threading
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from robustbench_local.__main__ import CONF
from robustbench_local.errors import UserError
from robustbench_local.evaluation.shards import Shard
from robustbench_local.results.shards import Shards
from robustbench_local.results.store import Store
from robustbench_local.run import Choices, run

SMALL = (
    "+experiment=smoke", "model.width=2", "model.hidden=8", "train.epochs=1", "device=cpu",
    "dataset.test_size=35", "batch_size=10", "eot.sample=10", "eot.limit=8",
)  # fmt: skip
PGD = ("attack.steps=3", "threat.epsilon=0.05")
EITHER_WAY = ("finished", "seconds", "environment")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """They are trained once for all tests."""
    return tmp_path_factory.mktemp("weights")


@cache
def composed(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*SMALL, *words], return_hydra_config=True)


@pytest.fixture
def evaluate(weights, tmp_path):
    """Call `evaluate("attack=fgsm", to="one", shard="1/2")`: a run with results in that folder."""
    return caller(weights, tmp_path)


def caller(weights, above):
    def call(*words, to="split", **settings):
        config = composed(*words)
        choices = dict(config.hydra.runtime.choices)
        ours = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        paths = {"data": "none", "cache": str(weights), "results": str(above / to)}
        return run(OmegaConf.merge(ours, {"paths": paths, **settings}), Choices(choices, (CONF,)))

    return call


def written(folder):
    """All that is recorded, but for times and machines: the text in order, and the arrays."""
    found = {}
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text())
        for key in EITHER_WAY:
            assert record.pop(key)
        record.pop("checksum", None)  # of the times too
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
COMMITTEE = (
    "attack.models=[{_target_: robustbench_local.models.SmallCNN, _partial_: true, width: 2, "
    "hidden: 8}]"
)
NOISE = ("defense=noise_fusion", "defense.wrap.noise_fusion.eot_samples=2")
CASES = {
    "pgd": ((*PGD, "attack.target=next"), 3),
    "curve": (("attack.steps=3", "threat.epsilon=[0,0.03,0.1]"), 3),
    "cascade": (("attack=standard", *STANDARD, "threat.epsilon=0.05"), 2),
    "curve of a random victim": (
        (*NOISE, "attack.steps=3", "threat.epsilon=[0.05,0.1]", "judge_draws=3"), 2
    ),
    # Its preparation asks the victim, and is to meet the same draws in every shard.
    "substitute of a random victim": (
        ("defense=rse", "attack=substitute", "attack.seeds=20", "attack.rounds=2",
         "attack.epochs=1", COMMITTEE, "judge_draws=2"), 2
    ),
}  # fmt: skip
SLOW = {
    "minimum norm": (("attack=fmn", "attack.steps=5", "threat.epsilon=[0.05,0.1]"), 2),
    "budget": (
        ("attack=square", "attack.queries=20", "threat.access=scores", "threat.query_budget=20"), 2
    ),
    "random layers": (("defense=rse", *PGD, "judge_draws=3"), 2),
    "rejection": (("defense=feature_squeezing_detector", *PGD), 2),
    "oblivious": (("defense=jpeg", "awareness=oblivious", *PGD), 2),
    "another library": (
        ("attack=torchattacks", "attack.name=PGD", "threat.epsilon=0.05"), 2
    ),
    "audit": (
        (*NOISE, *PGD, "judge_draws=2",
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
        assert evaluate(*words, shard=f"{number}/{count}") == []
        assert written(tmp_path / "split") == {}
        assert len(parts(tmp_path / "split")) == (number - 1) * len(expected)
    last = evaluate(*words, shard=f"1/{count}")
    assert {record["run_id"] for record in last} == expected
    one, split = (written(tmp_path / name) for name in ("one", "split"))
    assert split.keys() == one.keys() == expected
    for run_id in expected:
        assert split[run_id][0] == one[run_id][0]
        assert split[run_id][1] == one[run_id][1]
    assert parts(tmp_path / "split") == []


@pytest.fixture(scope="module")
def one(weights, tmp_path_factory):
    """What is recorded of a quick run in one piece."""
    folder = tmp_path_factory.mktemp("one")
    (record,) = caller(weights, folder)(*PGD)
    assert 0 < record["robust_accuracy"]["value"] < record["clean_accuracy"]["value"]
    return written(folder / "split")


@pytest.fixture
def nothing_runs(monkeypatch):
    """Call it, and no model is loaded or attacked from then on."""

    def forbid():
        def fail(*words):
            raise AssertionError("something ran")

        for name in ("get_model", "measure"):
            monkeypatch.setattr(f"robustbench_local.run.{name}", fail)

    return forbid


def part_of(folder, number, count=2):
    (run_folder,) = (path for path in (folder / "shards").iterdir() if path.is_dir())
    return Store(run_folder / f"{number}-of-{count}"), run_folder.name


def test_what_is_recorded_is_not_run_again(evaluate, one, tmp_path, nothing_runs, capsys):
    evaluate(*PGD, shard="2/2")
    assert "shard 2/2 recorded: 15 images; missing: 1/2" in capsys.readouterr().out
    assert not (tmp_path / "split/leaderboard.csv").exists()
    evaluate(*PGD, shard="1/2")
    assert "95% interval" in capsys.readouterr().out
    assert (tmp_path / "split/leaderboard.csv").exists()
    nothing_runs()
    for shard in (None, "1/2", "2/2", "2/3"):
        assert [record["run_id"] for record in evaluate(*PGD, shard=shard)] == list(one)
    assert written(tmp_path / "split") == one


def test_a_shard_that_is_recorded_waits_for_the_others(evaluate, tmp_path, nothing_runs, capsys):
    evaluate(*PGD, shard="1/2")
    before = {path: path.read_bytes() for path in (tmp_path / "split/shards").rglob("*.*z")}
    nothing_runs()
    assert evaluate(*PGD, shard="1/2") == []
    assert "shard 1/2 recorded before, not run again: 20 images" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}


def test_force_makes_every_shard_again(evaluate, one, tmp_path):
    for force in (False, True):
        assert evaluate(*PGD, shard="1/2", force=force) == []
        (record,) = evaluate(*PGD, shard="2/2", force=force)
    assert record["config"]["force"] is True
    text, arrays = written(tmp_path / "split")[record["run_id"]]
    assert (text.replace('"force": true', '"force": false'), arrays) == one[record["run_id"]]


def test_force_makes_a_shard_again_that_is_recorded(evaluate, nothing_runs):
    evaluate(*PGD, shard="1/2")
    nothing_runs()
    with pytest.raises(AssertionError, match="something ran"):
        evaluate(*PGD, shard="1/2", force=True)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_torn_part_is_made_again(evaluate, one, tmp_path, suffix):
    evaluate(*PGD, shard="1/2")
    store, run_id = part_of(tmp_path / "split", 1)
    path = store.records / f"{run_id}{suffix}"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(UserWarning):
        assert evaluate(*PGD, shard="2/2") == []
    assert written(tmp_path / "split") == {}
    evaluate(*PGD, shard="1/2")
    assert written(tmp_path / "split") == one


def test_other_numbers_of_shards_and_batches_of_other_sizes_never_mix(evaluate, one, tmp_path):
    assert evaluate(*PGD, shard="1/2") == []
    assert evaluate(*PGD, shard="2/3") == []
    assert evaluate(*PGD, shard="3/3") == []
    assert evaluate(*PGD, shard="2/2", batch_size=5) == []  # another run
    assert len(parts(tmp_path / "split")) == 4
    evaluate(*PGD, shard="1/3")
    assert written(tmp_path / "split") == one
    assert len(parts(tmp_path / "split")) == 1


def test_shards_that_attacked_other_weights_are_set_aside(evaluate, one, tmp_path):
    evaluate(*PGD, shard="1/2")
    store, run_id = part_of(tmp_path / "split", 1)
    part = store.find(run_id)
    part["weights"]["sha256"] = "0" * 64
    store.add(part, store.examples(run_id))
    with pytest.warns(UserWarning, match="shard 1/2 of run .* their weights differ"):
        assert evaluate(*PGD, shard="2/2") == []
    assert written(tmp_path / "split") == {}
    evaluate(*PGD, shard="1/2")
    assert written(tmp_path / "split") == one


def test_a_radius_more_or_less_deals_the_images_out_anew(evaluate, tmp_path):
    """Where one of two radii is recorded in the meantime, the other one is attacked alone."""
    curve = ("attack.steps=3", "threat.epsilon=[0.05,0.1]")
    evaluate(*curve, shard="1/2")
    (first,) = evaluate("attack.steps=3", "threat.epsilon=0.05")
    with pytest.warns(UserWarning, match="their batches differ"):
        evaluate(*curve, shard="2/2")
    evaluate(*curve, shard="1/2")
    (second,) = evaluate("attack.steps=3", "threat.epsilon=0.1", to="one")
    assert written(tmp_path / "split").keys() == {first["run_id"], second["run_id"]}
    (alone,) = written(tmp_path / "one").values()
    assert written(tmp_path / "split")[second["run_id"]] == alone


@pytest.mark.parametrize("moment", range(1, 5))
def test_dying_before_any_file_gets_its_name_loses_nothing(
    evaluate, one, tmp_path, monkeypatch, moment
):
    """The files of the last shard: its own two, then the two of the whole record."""
    evaluate(*PGD, shard="1/2")
    left = [moment]

    def deadly(*words, real=os.replace):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(*words)

    with monkeypatch.context() as dying:
        dying.setattr(os, "replace", deadly)
        with pytest.raises(KeyboardInterrupt):
            evaluate(*PGD, shard="2/2")
    assert written(tmp_path / "split") == {}
    # Once both parts are there, whichever shard is asked for next folds them.
    evaluate(*PGD, shard="1/2" if moment > 2 else "2/2")
    assert written(tmp_path / "split") == one
    assert parts(tmp_path / "split") == []


def test_two_that_finish_at_the_same_moment_fold_once(evaluate, one, tmp_path, monkeypatch):
    found = {}
    with monkeypatch.context() as watched:
        watched.setattr(
            Shards, "add", lambda self, *given: found.setdefault(self.shard, (self, given)) and None
        )
        for shard in ("1/2", "2/2"):
            evaluate(*PGD, shard=shard)
    for attempt in range(10):
        store, start, whole = Store(tmp_path / f"race{attempt}"), threading.Barrier(2), []

        def add(shard, store=store, start=start, whole=whole):
            before, given = found[shard]
            start.wait()
            whole.append(Shards(store, shard, before.fold_reports).add(*given))

        both = [threading.Thread(target=add, args=(Shard(k, 2),)) for k in (1, 2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert sorted(record is None for record in whole) == [False, True]
        assert written(store.folder) == one
        assert parts(store.folder) == []


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1/0", "a/b", "1", "-1/4", "1/4/4", "", "1.0/4"])
def test_what_is_no_shard_is_refused(evaluate, shard):
    with pytest.raises(UserError, match=r"is no part of an evaluation.*type for example shard=1/4"):
        evaluate(shard=shard)


@pytest.mark.parametrize(
    ("settings", "typed"),
    [
        ({"shard": "1/5"}, "35 test images make 4: type for example batch_size=7,"),
        ({"shard": "1/36"}, "batch_size=1 shard=1/35,"),
        (
            {"shard": "3/6", "threat": {"epsilon": [0.1, 0.2]}, "batch_size": 15},
            r"make 5: .*batch_size=10,",
        ),
    ],
)
def test_more_shards_than_batches_are_told_what_to_type(evaluate, nothing_runs, settings, typed):
    nothing_runs()  # it is told before a model is trained
    with pytest.raises(UserError, match=typed):
        evaluate(*PGD, **settings)


def test_every_image_is_in_exactly_one_shard():
    for images in (1, 7, 35, 100):
        for at_once in (1, 3, 10, 200):
            batches = -(-images // at_once)
            for count in range(1, batches + 1):
                rows = [Shard(k, count).rows(images, at_once=at_once) for k in range(1, count + 1)]
                assert [row for part in rows for row in part] == list(range(images))
                assert all(part.start % at_once == 0 and len(part) for part in rows)

"""A record made again agrees to the last digit, or it is said what does not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from robustbench_local.__main__ import CONF
from robustbench_local.results import Store
from robustbench_local.results.__main__ import main
from robustbench_local.results.agreement import compare_records, leaves
from robustbench_local.results.reproduce import radii_of, stored_config
from robustbench_local.run import Choices, run

QUICK = (
    "+experiment=smoke", "dataset.test_size=50", "model.width=4", "model.hidden=8",
    "train.epochs=1", "attack.steps=3", "judge_draws=3", "eot.sample=10", "eot.limit=2",
)  # fmt: skip

VICTIMS = {
    "fixed": ("defense=[bit_depth]",),
    "random": (
        "defense=[noise_fusion]", "defense.wrap.noise_fusion.draws=2",
        "defense.wrap.noise_fusion.eot_samples=2",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A results folder with a record of a fixed victim and one of a random one; their run ids."""
    folder = tmp_path_factory.mktemp("recorded")
    found = {}
    for name, overrides in VICTIMS.items():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = [f"paths.{key}={folder / key}" for key in ("data", "cache", "results")]
            config = compose("config", [*QUICK, *overrides, *paths])
        groups = {"model": "small_cnn", "train": "mnist", "attack": "pgd"}
        (record,) = run(config, Choices(groups, (CONF,)))
        found[name] = record["run_id"]
    return folder, found


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")

    def call(*words):
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def edited(folder, target, run_id, change):
    """The file of the record in another results folder, with a change."""
    record = Store(folder / "results").find(run_id)
    examples = Store(folder / "results").examples(run_id)
    change(record)
    Store(target).add(record, examples)
    return target / "records" / f"{run_id}.json"


@pytest.mark.parametrize("victim", list(VICTIMS))
def test_a_record_is_reproduced_to_the_last_digit(recorded, cli, tmp_path, victim):
    """In another folder, trained again: nothing but the record says what was run."""
    folder, found = recorded
    run_id = found[victim]
    record = Store(folder / "results").find(run_id)
    assert record["randomized"] == (victim == "random")
    threads, other = torch.get_num_threads(), 1 + (record["environment"]["threads"] == 1)
    torch.set_num_threads(other)  # sums are rounded otherwise: as many as were recorded are taken
    try:
        code, out, err = cli("--results", str(folder / "results"), "reproduce", run_id[:6],
                             "--cache", str(tmp_path / "cache"))  # fmt: skip
        assert torch.get_num_threads() == other
    finally:
        torch.set_num_threads(threads)
    assert "machine and packages" not in out
    assert code == 0, out + err
    assert "REPRODUCED: all" in out and out.count("exactly") == 2
    assert "run id would be" not in out and "not compared" not in out
    assert record["labels"]["defense"] in out
    assert list((tmp_path / "cache" / "weights").glob("*.safetensors"))
    assert not (tmp_path / "results").exists()


def test_edited_expectations_do_not_agree(recorded, cli, tmp_path):
    folder, found = recorded

    def change(record):
        record["perturbation"]["mean"] = 0.123
        record["clean_accuracy"].update(value=0.02, low=0.0, high=0.04)

    path = edited(folder, tmp_path / "edited", found["fixed"], change)
    code, out, _ = cli("reproduce", str(path), "--cache", str(folder / "cache"))
    assert code == 1
    assert "its comparability would be" not in out
    assert "NOT REPRODUCED" in out and "NOT within its interval" in out
    assert "perturbation.mean" in out and "0.123" in out
    assert "were not trained again" in out


def test_a_record_of_an_older_judge_can_agree_in_every_number(recorded, cli, tmp_path):
    """The key that says what it is ranked with is no number, and is told apart."""
    folder, found = recorded
    path = edited(folder, tmp_path / "edited", found["fixed"],
                  lambda record: record.update(comparability="of another judge"))  # fmt: skip
    code, out, _ = cli("reproduce", str(path), "--cache", str(folder / "cache"))
    assert code == 0 and "REPRODUCED: all" in out
    assert "its comparability would be" in out and "no ranking holds both" in out


def both(recorded, victim="fixed"):
    folder, found = recorded
    store = Store(folder / "results")
    return store.find(found[victim]), store.examples(found[victim])


def test_other_machines_may_differ_within_the_intervals(recorded):
    record, examples = both(recorded)
    again = json.loads(json.dumps(record))
    again["robust_accuracy"]["value"] = record["robust_accuracy"]["high"]
    there = compare_records(record, again, examples, examples)
    assert there.exit_code == 1 and there.within and not there.elsewhere
    again["environment"]["packages"]["torch"] = "99.0"
    there = compare_records(record, again, examples, examples)
    assert there.exit_code == 0 and not there.exact and "torch" in there.elsewhere[0]
    again["robust_accuracy"]["value"] = record["robust_accuracy"]["high"] + 1e-6
    assert compare_records(record, again, examples, examples).exit_code == 1
    commit = json.loads(json.dumps(record))
    commit["environment"]["git_commit"] = "other"
    commit["robust_accuracy"]["value"] = record["robust_accuracy"]["low"]
    there = compare_records(record, commit, examples, examples)
    assert there.exit_code == 1 and "git_commit" in there.code[0]


@pytest.mark.parametrize(
    "place",
    ["clean_accuracy.value", "robust_accuracy.low", "perturbation.max", "weights.sha256",
     "accuracy_of_draws.robust.2", "passes_per_attacked_image.forward", "eot.samples",
     "metrics.attacked.confusion.0.0"],
)  # fmt: skip
def test_every_number_counts(recorded, place):
    record, examples = both(recorded, "random")
    assert place in leaves(record)
    again = json.loads(json.dumps(record))
    node = again
    *path, last = [int(step) if step.isdigit() else step for step in place.split(".")]
    for step in path:
        node = node[step]
    node[last] = "0" if last == "sha256" else (node[last] or 0) + 1e-15 + (last in ("samples", 0))
    if node[last] == leaves(record)[place]:  # 1e-15 is below the last digit
        node[last] += 1e-12
    (difference,) = compare_records(record, again, examples, examples).differences
    assert difference.name == place


def test_seconds_and_sentences_do_not_count_and_each_image_does(recorded):
    record, examples = both(recorded)
    again = json.loads(json.dumps(record))
    again["seconds"]["attack"] += 1
    again["finished"] = "later"
    again["audit"]["checks"][0]["why"] = "said better"
    again["audit"]["checks"].reverse()
    assert compare_records(record, again, examples, examples).exact
    robust = examples.robust_correct.copy()
    robust[7] = 1 - robust[7]
    other = replace(examples, robust_correct=robust)
    (difference,) = compare_records(record, again, examples, other).differences
    assert difference.name == "examples.robust_correct" and difference.now == "differs in 1 images"


def test_parts_of_one_name_are_told_apart():
    parts = {"parts": [{"name": "apgd", "broken": 1}, {"name": "apgd", "broken": 2}]}
    assert sorted(leaves(parts).values()) == [1, 2]


def test_names_with_a_point_do_not_hide_each_other():
    """A number that overwrites another would not be compared."""
    parts = {"parts": [{"name": "lib.apgd", "broken": 1}, {"name": "lib.apgd", "broken": 2}]}
    assert sorted(leaves(parts).values()) == [1, 2]


def test_arrays_that_an_older_record_has_not_are_no_difference(recorded):
    """Their place is held by arrays of another shape than those of a victim without them."""
    record, examples = both(recorded)
    assert not examples.clean_rejected.size
    older = replace(examples, clean_rejected=np.zeros((len(examples.labels), 0), np.float16))
    assert compare_records(record, record, older, examples).exact


def test_what_is_null_now_and_was_a_number_is_a_difference(recorded):
    record, examples = both(recorded)
    again = {**json.loads(json.dumps(record)), "metrics": None}
    outcome = compare_records(record, again, examples, examples)
    assert not outcome.exact and not outcome.missing
    assert {each.name.split(".")[0] for each in outcome.differences} == {"metrics"}


def test_radii_that_were_attacked_together_are_so_again(cli, tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        paths = [f"paths.{key}={tmp_path / key}" for key in ("data", "cache", "results")]
        config = compose("config", [*QUICK, "threat.epsilon=[0,0.05,0.1,0.3]", *paths])
    groups = {"model": "small_cnn", "train": "mnist", "attack": "pgd"}
    none, *together = run(config, Choices(groups, (CONF,)))
    store = Store(tmp_path / "results")
    assert radii_of(store, none) == [0] and none["radii_at_once"] == 1
    assert [radii_of(store, each) for each in together] == [[0.05, 0.1, 0.3]] * 3
    words = ("reproduce", together[1]["run_id"], "--cache", str(tmp_path / "cache"))
    code, out, err = cli("--results", str(store.folder), *words)
    assert code == 0 and "REPRODUCED: all" in out and "not compared" not in out, out + err
    (store.records / f"{together[0]['run_id']}.json").unlink()
    assert radii_of(store, together[1]) == [0.1]
    code, out, err = cli("--results", str(store.folder), *words)
    assert code == 0 and "REPRODUCED: all" in out, out + err
    assert "together with 2 other radii, whose records are not there: passes_per_att" in out


def test_newer_keys_get_their_defaults_and_unknown_ones_are_told(recorded):
    record, _ = both(recorded, "random")
    config, notes = stored_config(record, [])
    assert {key: config[key] for key in record["config"]} == record["config"] and not notes
    older = json.loads(json.dumps(record))
    del older["config"]["audit"]["passes"]
    del older["config"]["eot"]
    del older["config"]["attack"]["best_iterate"]
    older["config"]["gone"] = 1
    older["config"]["train"]["old"] = 1
    older["config"]["attack"]["lost"] = 1
    config, notes = stored_config(older, [])
    assert config["eot"]["sample"] == 100  # that of the configuration, not of the record
    for key in set(record["config"]) - {"eot"}:
        assert config[key] == record["config"][key]
    assert len(notes) == 6
    for key in ("audit.passes", "eot", "attack.best_iterate", "gone", "train.old", "attack.lost"):
        assert any(note.startswith(f"{key} is") for note in notes)


def test_a_record_older_than_audits_is_audited_no_more_than_it_was():
    store = Store(Path(__file__).parent / "fixtures" / "version3", repairs=False)
    (record,) = store.all()
    assert "audit" not in record["config"]
    config, notes = stored_config(record, [])
    assert config["audit"]["level"] == "cheap"
    assert any(note.startswith("audit is newer") for note in notes)


def test_paths_are_given_again(recorded, cli):
    record, _ = both(recorded)
    config, _ = stored_config(record, ["model.checkpoint=/x/y.pt", "dataset.split_seed=3"])
    assert config["model"]["checkpoint"] == "/x/y.pt" and config["dataset"]["split_seed"] == 3
    folder, found = recorded
    words = ("--results", str(folder / "results"), "reproduce")
    code, _, err = cli(*words, found["fixed"], "--set", "nothing")
    assert code == 1 and "type for example --set dataset.path=FILE" in err
    for missing in ("no/such/file.json", "zzzz"):
        code, _, err = cli(*words, missing)
        assert code == 1 and "type" in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_data_set_given_by_path_says_how_to_give_it(recorded, cli, tmp_path):
    folder, found = recorded

    def change(record):
        record["config"]["dataset"] = {
            "_target_": "robustbench_local.data.Npz", "path": "gone.npz", "name": None,
            "validation_fraction": 0.1, "split_seed": 0, "test_size": None,
        }  # fmt: skip

    path = edited(folder, tmp_path / "edited", found["fixed"], change)
    code, _, err = cli("reproduce", str(path))
    assert code == 1 and "gone.npz" in err and "--set dataset.path=" in err

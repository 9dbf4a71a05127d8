"""Records of older versions, from files as they were written then."""

import json
import shutil
from pathlib import Path

import pytest

from robustbench_local.results import Store, fold
from robustbench_local.results.migration import OLDEST, RECORD_VERSION, migrate
from robustbench_local.results.report import doubts
from robustbench_local.results.statistics import accuracy, wilson

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = range(OLDEST, RECORD_VERSION)


def old(version):
    store = Store(FIXTURES / f"version{version}", repairs=False)
    (found,) = store.all()
    return store, found


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_record_loads_with_its_numbers_and_what_it_lacks(version):
    store, found = old(version)
    examples = store.examples(found["run_id"])
    assert found["version"] == RECORD_VERSION
    assert found["n"] == len(examples.labels) == 12
    robust = pytest.approx(0.325) if version == 5 else 0.5
    assert found["robust_accuracy"]["value"] == examples.robust_correct.mean() == robust
    assert found["detection"] is None
    assert found["randomized"] is (version == 5) is (found["accuracy_of_draws"] is not None)
    if version == 3:
        assert (found["learned"], found["metrics"], found["eot"]) == ({}, None, None)
        assert examples.clean_probabilities.shape == (12, 0)
    assert any("subset" in sentence for sentence in doubts(found))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_record_is_a_line_of_the_leaderboard(version):
    store, found = old(version)
    (line,) = fold(store).query("origin == 'local'").to_dict("records")
    attack, robust = ("fgsm", pytest.approx(0.325)) if version == 5 else ("pgd", 0.5)
    assert (line["run_ids"], line["worst_case"], line[attack]) == (found["run_id"], robust, robust)
    assert line["queries"] == found["passes_per_attacked_image"]["forward"] > 1
    assert line["parameters"] == found["weights"]["parameters"] > 1000


def test_the_examples_of_an_older_record_are_checked_when_it_is_folded(tmp_path):
    shutil.copytree(FIXTURES / "version4", tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match="its examples are damaged; set aside"):
        assert "local" not in set(fold(Store(tmp_path))["origin"])


def test_limits_of_random_victims_are_those_that_would_be_written_today():
    store, found = old(5)
    examples = store.examples(found["run_id"])
    (path,) = store.records.glob("*.json")
    written = json.loads(path.read_text())["robust_accuracy"]
    clean = accuracy(examples.clean_correct, examples.clean_draws)._asdict()
    today = accuracy(examples.robust_correct, examples.robust_draws)._asdict()
    assert (found["clean_accuracy"], found["robust_accuracy"]) == (clean, today)
    assert today["low"] < written["low"] < written["high"] < today["high"]
    (summary,) = store.summaries()  # which reads some keys only
    assert (summary.clean._asdict(), summary.robust._asdict()) == (clean, today)


def test_records_of_version_4_may_hold_draws_already():
    before = {"value": 0.5, "low": 0.4, "high": 0.6}
    told = {
        "version": 4, "judge_draws": 2, "n": 100,
        "clean_accuracy": before, "robust_accuracy": before,
        "accuracy_of_draws": {"clean": [0.5, 0.5], "robust": [0.4, 0.6]},
    }  # fmt: skip
    found = migrate(told)
    assert found["clean_accuracy"] == wilson(50, 100)._asdict()
    assert (found["robust_accuracy"]["low"], found["robust_accuracy"]["high"]) == (0, 1)


def test_a_run_recorded_before_and_today_is_one_run(tmp_path):
    before, found = old(5)
    today = Store(tmp_path)
    today.add(found, before.examples(found["run_id"]))
    report = today.merge(before.folder)
    assert (report.duplicates, report.conflicts) == ([found["run_id"]], [])


def test_nothing_that_was_measured_is_changed():
    told = {"version": 3, "judge_draws": 10, "learned": {"x": 1}, "randomized": False, "eot": 7}
    assert migrate(told) | told == migrate(told) | {"version": 3}
    assert migrate({"version": 4, "judge_draws": 10})["randomized"] is True
    assert migrate({"version": RECORD_VERSION, "only": 1}) == {"version": RECORD_VERSION, "only": 1}

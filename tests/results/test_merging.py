"""Records from another machine: each counts once, and no number is replaced."""

import json
import os
import shutil

import pytest
from test_leaderboard import add, record
from test_leaderboard import examples as outcome_of

from robustbench_local.errors import UserError
from robustbench_local.results import Store, fold
from robustbench_local.results.integrity import encode
from robustbench_local.results.migration import RECORD_VERSION


@pytest.fixture
def stores(tmp_path):
    return Store(tmp_path / "here"), Store(tmp_path / "there")


def content(store):
    return {path.name: path.read_bytes() for path in store.records.iterdir()}


def test_what_is_missing_is_copied_and_nothing_twice(stores):
    here, there = stores
    add(here, "a", [1, 0], defense="a")
    add(there, "b", [1, 1], defense="b")
    add(there, "c", [0, 0], defense="c")
    theirs = content(there)
    report = here.merge(there.folder)
    assert (report.added, report.duplicates) == (["b", "c"], [])
    assert not report.conflicts and not report.damaged
    assert set(fold(here)["defense"]) == {"a", "b", "c"}
    assert content(here).items() >= theirs.items()
    assert content(there) == theirs
    again = here.merge(there.folder)
    assert (again.added, again.duplicates) == ([], ["b", "c"])


def test_a_run_made_on_both_is_a_duplicate_whatever_time_it_took(stores):
    here, there = stores
    add(here, "a", [1, 0], finished="2026-01-01T00:00:00")
    outcome = outcome_of([1, 0])
    slow = record("a", outcome, finished="2026-02-02T00:00:00")
    there.add({**slow, "seconds": {"attack": 9.0}, "environment": {"threads": 64}}, outcome)
    before = content(here)
    report = here.merge(there.folder)
    assert (report.added, report.duplicates, report.conflicts) == ([], ["a"], [])
    assert content(here) == before


def test_other_numbers_for_one_run_are_a_conflict_that_says_what_differs(stores):
    here, there = stores
    add(here, "a", [1, 0, 1, 0])
    add(there, "a", [1, 1, 1, 0])
    before = content(here)
    ((run_id, sentence),) = here.merge(there.folder).conflicts
    assert run_id == "a"
    assert "robust_accuracy.value is 0.5 here and 0.75 there" in sentence
    assert content(here) == before


def test_other_weights_and_other_images_are_conflicts_though_accuracies_agree(stores):
    here, there = stores
    add(here, "a", [1, 0])
    add(there, "a", [0, 1])
    add(here, "b", [1, 0], weights="mine")
    add(there, "b", [1, 0], weights="yours")
    conflicts = dict(here.merge(there.folder).conflicts)
    assert conflicts["a"] == "robust_correct of single images differ"
    assert conflicts["b"] == "hash of the weights is ('mine',) here and ('yours',) there"


def test_a_flag_that_one_of_the_two_lacks_is_a_conflict(stores):
    """It decides whether the row is ranked, and may be all that differs."""
    here, there = stores
    add(here, "a", [1, 0], flags=[("subset", False)])
    add(there, "a", [1, 0], flags=[("subset", False), ("zero_gradient", True)])
    conflicts = dict(here.merge(there.folder).conflicts)
    assert conflicts == {"a": "flag.zero_gradient is None here and severe there"}


def test_damaged_and_newer_records_are_named_left_there_and_not_copied(stores):
    here, there = stores
    for run_id in "abcd":
        add(there, run_id, [1, 0])
    (there.records / "a.json").write_text("half")
    (there.records / "b.npz").unlink()
    path = there.records / "c.json"
    path.write_bytes(encode({**json.loads(path.read_text()), "version": RECORD_VERSION + 1}))
    before = content(there)
    report = here.merge(there.folder)
    assert report.added == ["d"]
    assert [told.split(":")[0] for told in report.damaged] == ["a.json", "b.json", "c.json"]
    assert "upgrade" in report.damaged[2]
    assert content(there) == before
    assert sorted(content(here)) == ["d.json", "d.npz"]


def test_what_a_newer_version_wrote_here_is_not_replaced(stores):
    here, there = stores
    for store in stores:
        add(store, "a", [1, 0])
    path = here.records / "a.json"
    path.write_bytes(encode({**json.loads(path.read_text()), "version": RECORD_VERSION + 1}))
    before = content(here)
    with pytest.warns(UserWarning, match="upgrade"):
        ((run_id, sentence),) = here.merge(there.folder).conflicts
    assert run_id == "a" and "is not replaced" in sentence and "upgrade" in sentence
    assert content(here) == before


def test_a_merge_that_was_interrupted_is_made_again(stores, monkeypatch):
    here, there = stores
    for run_id in "abc":
        add(there, run_id, [1, 0], defense=run_id)
    real, left = os.replace, [3]

    def interrupted(source, target):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        here.merge(there.folder)
    monkeypatch.undo()
    report = here.merge(there.folder)
    assert (report.duplicates, report.added) == (["a"], ["b", "c"])
    assert content(here) == content(there)


def test_a_damaged_record_here_is_replaced_by_a_whole_one_from_there(stores):
    here, there = stores
    for store in stores:
        add(store, "a", [1, 0])
    (here.records / "a.json").write_text("half")
    with pytest.warns(UserWarning, match="set aside"):
        assert here.merge(there.folder).added == ["a"]
    assert here.find("a") is not None


def test_records_of_older_versions_are_copied_as_they_are(stores, request):
    here, there = stores
    shutil.copytree(request.path.parent / "fixtures" / "version3", there.folder)
    (run_id,) = here.merge(there.folder).added
    assert content(here) == content(there)
    assert here.merge(there.folder).duplicates == [run_id]


def test_a_folder_without_records_is_an_error_that_says_what_to_type(stores, tmp_path):
    with pytest.raises(UserError, match=r"holds no records; expected a results folder.* type "):
        stores[0].merge(tmp_path / "nowhere")

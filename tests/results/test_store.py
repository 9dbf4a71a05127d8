"""Whatever is not exactly what was written is told, set aside and never counted."""

import errno
import json
import os
import shutil
import threading
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from test_leaderboard import add, examples, record

from robustbench_local.errors import UserError
from robustbench_local.results import Store, fold, write_leaderboard, writing
from robustbench_local.results.integrity import Damaged, UnknownVersion, decode, encode
from robustbench_local.results.store import RECORD_VERSION


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def names(store):
    return sorted(path.name for path in store.records.iterdir())


def test_a_record_is_one_json_document_and_comes_back(store):
    add(store, "a", [1, 0, 1], flags=[("subset", False)], cleared=["randomized"])
    text = (store.records / "a.json").read_text()
    assert json.loads(text) == store.find("a") | {"checksum": text[14:78]}
    assert json.loads(text)["version"] == RECORD_VERSION == 6
    assert store.examples("a").robust_correct.tolist() == [1, 0, 1]
    assert names(store) == ["a.json", "a.npz"]


def test_a_tear_at_any_byte_and_any_changed_byte_is_seen(store):
    add(store, "a", [1, 0, 1])
    data = (store.records / "a.json").read_bytes()
    version = data.index(b'"version": 6') + len('"version": ')
    for cut in range(len(data)):
        with pytest.raises(Damaged):
            decode(data[:cut])
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        # Of 6, the version, this makes 7: what that would be nobody knows, it is left alone.
        with pytest.raises(UnknownVersion if place == version else Damaged):
            decode(bytes(changed))
    for older in b"345":  # versions that are read, some of which never had a checksum
        with pytest.raises(Damaged):
            decode(data[:version] + bytes([older]) + data[version + 1 :])
    for more in (data + b"\n", b" " + data, data + data, b"", b"null", b"[1]", b"\x00" * 99):
        with pytest.raises(Damaged):
            decode(more)


def tear(store):
    path = store.records / "a.json"
    path.write_bytes(path.read_bytes()[:-40])


def edit_a_digit(store):
    path = store.records / "a.json"
    path.write_text(path.read_text().replace('"value": 0.5', '"value": 0.9'))


def lay_out_anew(store):
    path = store.records / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


def put_under_another_name(store):
    for suffix in (".json", ".npz"):
        shutil.copy(store.records / f"good{suffix}", store.records / f"a{suffix}")


def put_something_else(store):
    (store.records / "a.json").write_text('{"name": "shopping", "items": []}')


def lose_the_examples(store):
    (store.records / "a.npz").unlink()


def tear_the_examples(store):
    path = store.records / "a.npz"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("read", ["find", "all", "fold"])
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (tear, "torn"),
        (edit_a_digit, "checksum"),
        (lay_out_anew, "checksum"),
        (put_under_another_name, "another run"),
        (put_something_else, "no record"),
        (lose_the_examples, "missing"),
        (tear_the_examples, "damaged"),
    ],
)
def test_damage_is_told_once_and_set_aside(store, damage, why, read):
    for run_id in ("a", "good"):
        add(store, run_id, [1, 0], defense=run_id)
    damage(store)
    before = {path.name: path.read_bytes() for path in store.records.glob("a.*")}
    with pytest.warns(UserWarning, match=f"a.json is not counted: .*{why}.* as a.json.damaged"):
        assert read_by(store, read) == {"good"}
    assert names(store) == sorted(
        [*(f"{name}.damaged" for name in before), "good.json", "good.npz"]
    )
    for name, content in before.items():  # there to be studied
        assert (store.records / f"{name}.damaged").read_bytes() == content
    assert read_by(store, read) == {"good"}  # and no second warning, which would be an error
    add(store, "a", [1, 1], defense="a")
    assert read_by(store, read) == {"a", "good"}


def read_by(store, way):
    if way == "fold":
        return set(" ".join(fold(store)["run_ids"]).split())
    if way == "all":
        return {found["run_id"] for found in store.all()}
    return {name for name in ("a", "good") if store.find(name)}


@pytest.mark.parametrize("swapped", [False, True])
def test_examples_that_are_not_those_of_the_record_are_never_read(store, swapped):
    """Folding reads none of them; whoever does is told."""
    for run_id, robust in (("a", [1, 0, 0, 1]), ("b", [0, 1, 0, 1])):
        add(store, run_id, robust, defense=run_id)
    one, other = (store.records / f"{run_id}.npz" for run_id in "ab")
    data = other.read_bytes() if swapped else one.read_bytes()[:-1] + b"x"
    one.write_bytes(data)
    with (
        pytest.warns(UserWarning, match=r"a.json is not counted: its examples are damaged"),
        pytest.raises(UserError, match=r"run a has no whole record in .*: run it again"),
    ):
        store.examples("a")
    with pytest.raises(UserError, match="run a has no whole record"):
        store.examples("a")
    assert store.examples("b").robust_correct.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["pickled", "one array", "text", "others"])
def test_foreign_examples_are_damage_though_their_hash_is_right(store, kind):
    """Whoever made such a record up: nothing is unpickled, and nothing ends in a traceback."""
    add(store, "a", [1, 0])
    path = store.records / "a.npz"
    with path.open("wb") as file:
        if kind == "pickled":
            np.savez(file, indices=np.array([{}, []], object), labels=np.zeros(2))
        elif kind == "one array":
            np.save(file, np.zeros(2))
        elif kind == "others":
            np.savez(file, weights=np.zeros(2))
        else:
            file.write(b"nothing of ours")
    whole = json.loads((store.records / "a.json").read_text())
    data = path.read_bytes()
    told = {"examples_sha256": sha256(data).hexdigest(), "examples_bytes": len(data)}
    (store.records / "a.json").write_bytes(encode({**whole, **told}))
    with (
        pytest.warns(UserWarning, match=r"a.json is not counted: its examples are no arrays of"),
        pytest.raises(UserError, match="run a has no whole record"),
    ):
        store.examples("a")
    assert names(store) == ["a.json.damaged", "a.npz.damaged"]


def test_what_a_newer_version_wrote_is_left_alone(store):
    add(store, "a", [1, 0])
    add(store, "b", [1, 0], defense="other")
    path = store.records / "a.json"
    newer = {**json.loads(path.read_text()), "version": RECORD_VERSION + 1, "new": "field"}
    path.write_bytes(encode(newer))
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"a.json is not counted: it is of version 7 .*upgrade"):
        assert fold(store)["defense"].tolist() == ["other"]
    with pytest.warns(UserWarning, match="upgrade"):
        assert store.find("a") is None
    with pytest.raises(UserError, match=r"a.json is not replaced: .*upgrade.*paths.results=DIR"):
        add(store, "a", [1, 1])
    assert path.read_bytes() == before and len(names(store)) == 4


def test_what_is_older_than_can_be_read_is_left_alone(store):
    add(store, "a", [1, 0])
    path = store.records / "a.json"
    older = {**json.loads(path.read_text()), "version": 2}
    path.write_text(json.dumps(older))
    with pytest.warns(UserWarning, match="version 2, older than any that can be read"):
        assert fold(store).empty
    with pytest.raises(UnknownVersion):
        decode(path.read_bytes())
    assert path.exists()


def test_examples_alone_and_temporary_files_count_for_nothing_and_go_with_the_next_run(store):
    """What killed writers leave."""
    add(store, "a", [1, 0])
    shutil.move(store.records / "a.json", store.records / ".a.json.1-ab.tmp")
    assert fold(store).empty and store.find("a") is None
    (store.records / ".a.json.1-ab.tmp").write_text("half")
    add(store, "a", [1, 1])
    assert fold(store)["worst_case"].tolist() == [1.0]
    assert names(store) == ["a.json", "a.npz"]


def test_a_writer_killed_between_its_two_files_loses_nothing(store, monkeypatch):
    """The examples are replaced and the record is not: what was about to be done is done."""
    add(store, "a", [1, 0])
    real = os.replace

    def kill(source, target):
        if str(target).endswith(".json"):
            shutil.copy(source, store.folder / "left")  # a process that dies cleans up nothing
            left.append(source)
            raise KeyboardInterrupt
        real(source, target)

    left = []
    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        add(store, "a", [1, 1])
    monkeypatch.undo()
    shutil.move(store.folder / "left", left[0])
    assert store.find("a")["robust_accuracy"]["value"] == 1.0
    assert fold(store)["worst_case"].tolist() == [1.0]
    assert names(store) == ["a.json", "a.npz"]


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_record_that_was_there(store, monkeypatch, written):
    """Whether the bytes find no room, or the system says so only when asked to keep them."""
    add(store, "a", [1, 0])
    before = {name: (store.records / name).read_bytes() for name in names(store)}
    left, write, sync = [written], Path.write_bytes, os.fsync

    def full(work):
        def limited(target, *rest):
            if left[0] == 0:
                if isinstance(target, Path):
                    write(target, rest[0][:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1
            return work(target, *rest)

        return limited

    monkeypatch.setattr(Path, "write_bytes", full(write))
    monkeypatch.setattr(os, "fsync", full(sync))
    with pytest.raises(OSError, match="No space left on device") as failure:
        add(store, "a", [1, 1])
    monkeypatch.undo()
    assert failure.value.filename == str(store.records / "a.json")
    assert {name: (store.records / name).read_bytes() for name in names(store)} == before
    assert store.find("a")["robust_accuracy"]["value"] == 0.5


@pytest.fixture
def read_only(store, monkeypatch):
    """Makes the results folder one that can be read only; a superuser heeds no permissions."""

    def make():
        real = os.open

        def refuse(path, flags, *rest, **keywords):
            inside = str(path).startswith(str(store.folder))
            if inside and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real(path, flags, *rest, **keywords)

        def replace(source, target):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(os, "replace", replace)

    return make


def test_a_folder_that_can_be_read_only_is_read(store, read_only):
    for run_id in "ab":
        add(store, run_id, [1, 0], defense=run_id)
    edit_a_digit(store)
    shutil.rmtree(store.folder / ".lock", ignore_errors=True)
    before = names(store)
    read_only()
    assert store.find("b")["run_id"] == "b"
    for _ in range(2):
        with pytest.warns(UserWarning, match="checksum is wrong; it cannot be set aside"):
            assert fold(store)["defense"].tolist() == ["b"]
    with pytest.raises(OSError, match="Read-only file system"):
        write_leaderboard(store)
    assert names(store) == before


class Unlocked(Store):
    """On a shared file system whose locks do not reach across machines."""

    def lock(self):
        return nullcontext()


@pytest.mark.parametrize("began", ["before", "after"])
def test_two_machines_that_write_one_run_leave_a_whole_record(tmp_path, monkeypatch, began):
    """Their numbers differ, as they may on two kinds of machine: files of both would be damage.

    The one that begins after the other takes its temporary files for what a killed writer left.
    """
    store, real, met = Unlocked(tmp_path, repairs=False), os.replace, []
    if began == "before":
        monkeypatch.setattr(writing, "remove_leftovers", lambda path: None)

    def replace(source, target):
        if str(target).endswith("a.json") and not met:
            met.append(target)  # the other machine comes between the two files of the first
            add(store, "a", [1, 1, 1, 0])
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    add(store, "a", [1, 0, 0, 0])
    assert met
    assert store.find("a")["robust_accuracy"]["value"] == 0.25
    assert store.examples("a").robust_correct.tolist() == [1, 0, 0, 0]
    assert names(store) == ["a.json", "a.npz"]


def test_many_writers_without_a_common_lock_end_with_a_whole_record(tmp_path):
    store, failed = Unlocked(tmp_path, repairs=False), []

    def work(worker):
        outcome = examples(np.arange(20) % (worker + 2) > 0)
        try:
            for _ in range(5):
                store.add(record("a", outcome), outcome)
        except Exception as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed
    found = store.find("a")
    assert found["robust_accuracy"]["value"] == store.examples("a").robust_correct.mean()
    assert names(store) == ["a.json", "a.npz"]


def test_outcomes_that_the_record_does_not_hold_are_checked_before_they_count(store):
    """Shares that are no whole number of recorded draws are read from the examples."""
    for run_id in "ab":
        add(store, run_id, [0.9, 0.2], judge_draws=10, defense=run_id)
    assert fold(store)["worst_case"].tolist() == [pytest.approx(0.55)] * 2
    path = store.records / "a.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match=r"a.json is not counted: its examples are damaged"):
        assert fold(store)["defense"].tolist() == ["b"]


def test_whoever_holds_the_lock_may_set_aside(store):
    """`write_leaderboard` folds under the lock, and folding mends."""
    add(store, "a", [1, 0])
    tear(store)
    with pytest.warns(UserWarning, match="set aside"):
        write_leaderboard(store)
    assert not store.lock().is_locked

"""What a sweep is before it starts and after it ends, without running anything."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from robustbench_local.results import Store
from robustbench_local.sweeps import devices
from robustbench_local.sweeps.devices import visible_gpus
from robustbench_local.sweeps.ending import only_these
from robustbench_local.sweeps.estimate import estimate
from robustbench_local.sweeps.journal import Entry, Info, Journal
from robustbench_local.sweeps.plan import Job, distinct_trainings_first, name_job, varying
from robustbench_local.sweeps.watch import duration


def job(name, *trainings, store=None, **labels):
    return Job([f"x={name}"], name, store or Store(Path("nowhere")), (name,), trainings,
               labels=labels, images=labels.pop("images", 0))  # fmt: skip


def test_each_training_is_begun_before_any_is_used_twice():
    jobs = [job("a", "t1"), job("b", "t1"), job("c", "t2"), job("d"), job("e", "t1", "part"),
            job("f", "t2", "part")]  # fmt: skip
    assert [each.name for each in distinct_trainings_first(jobs)] == ["a", "c", "e", "b", "d", "f"]


def test_a_run_is_named_by_what_tells_it_from_the_others():
    jobs = [
        ["+experiment=smoke", f"attack.steps={steps}", f"attack={attack}", f"defense={defense}"]
        for steps in (3, 5)
        for attack in ("fgsm", "pgd")
        for defense in ("none", "[jpeg,median]")
    ]
    keys = varying(jobs)
    assert keys == {"attack.steps", "attack", "defense"}
    names = [name_job(words, keys, ["attack", "defense"]) for words in jobs]
    assert names[:2] == ["none, fgsm, steps=3", "jpeg+median, fgsm, steps=3"]
    assert len(set(names)) == 8


def test_only_what_failed_is_quoted_where_overrides_can_say_it():
    assert only_these([["a=1", "b=[x,y]"], ["a=2", "b=[x,y]"]]) == ["a=1,2", "b=[x,y]"]
    square = [[f"a={a}", f"b={b}"] for a in (1, 2) for b in (3, 4)]
    assert only_these(square) == ["a=1,2", "b=3,4"]
    assert only_these(square[:3]) is None  # two keys would bring back the fourth
    assert only_these([["a=1"], ["a=1", "b=2"]]) is None


def test_durations_are_as_long_as_they_are():
    assert [duration(each) for each in (0.2, 14, 100, 3600, 7500)] == [
        "1 s", "14 s", "2 min", "60 min", "2 h 05 min",
    ]  # fmt: skip


class Records(Store):
    """A store of records made up here."""

    @property
    def records(self):
        return Path(self.folder)

    def find(self, run_id):
        dataset, model, defense, attack, seconds = run_id.split(",")
        labels = {"dataset": dataset, "model": model, "defense": defense, "attack": attack,
                  "awareness": "adaptive"}  # fmt: skip
        told = {"attack": float(seconds), "judge": 0.0, "training": 100.0}
        return {"labels": labels, "n": 10, "seconds": told}


def test_an_estimate_takes_the_closest_earlier_runs(tmp_path):
    for name in ("digits,cnn,jpeg-quality50,pgd-steps9,20", "digits,cnn,none,pgd,30",
                 "digits,cnn,none,fgsm,1"):  # fmt: skip
        (tmp_path / f"{name}.json").touch()
    store = Records(tmp_path)
    common = {"dataset": "digits", "model": "cnn", "awareness": "adaptive", "images": 20}
    same = job("same", store=store, **common, defense="jpeg", attack="pgd")
    other = job("other", store=store, **common, defense="median", attack="fgsm")
    unknown = job("unknown", store=store, **common, defense="none", attack="square")
    trained = job("trained", "t", store=store, **common, defense="jpeg", attack="pgd")
    trained.untrained = True
    found = estimate([same, other, unknown, trained])
    assert found.seconds[same] == pytest.approx(40)  # 2 s for an image
    assert found.seconds[other] == pytest.approx(2)
    assert found.seconds[unknown] == pytest.approx((40 + 2 + 40) / 3)
    assert found.seconds[trained] == pytest.approx(140)
    assert found.rests_on == (
        "2 of 4 have earlier runs of the same attack on the same defense, 1 only similar ones, "
        "1 none"
    )
    assert not estimate([job("x", store=Records(tmp_path / "empty"), **common, defense="none",
                             attack="pgd")]).known  # fmt: skip


def test_gpus_are_those_that_a_setting_leaves_visible():
    assert visible_gpus({}, 3) == ["0", "1", "2"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-abc"}, 2) == ["2", "GPU-abc"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, 0) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, 0) == []  # named, and not there


CLAIM = """
import os, sys
from pathlib import Path
from robustbench_local.sweeps.devices import settle
from robustbench_local.sweeps.journal import Journal
journal = Journal(Path(sys.argv[1]))
settle(journal, journal.info(), sys.argv[2])
settle(journal, journal.info(), sys.argv[2])  # at the next run of the same process
print(os.environ.get("CUDA_VISIBLE_DEVICES"), "torch" in sys.modules, flush=True)
sys.stdin.read()
"""


def test_gpus_are_dealt_out_among_processes(tmp_path):
    """Fake ones: what is dealt is a name, which CUDA reads when it starts."""
    journal = Journal(tmp_path / "sweep")
    journal.open(Info("here", os.getpid(), str(tmp_path), gpus=["4", "7"], workers=3))
    environment = {key: value for key, value in os.environ.items() if "CUDA" not in key}

    def start(device="auto"):
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(journal.folder), device], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip
        return process, process.stdout.readline().split()

    processes, told = zip(*[start() for _ in range(3)], strict=True)
    assert sorted(gpu for gpu, _ in told) == ["4", "4", "7"]
    assert all(torch == "False" for _, torch in told)
    processes[1].kill()  # frees what it had
    processes[1].wait()
    last, (gpu, _) = start()
    assert gpu == told[1][0]
    named, (gpu, _) = start("cuda:1")
    assert gpu == "None"
    for process in (*processes, last, named):
        process.kill()
        process.communicate()


def test_the_launching_process_takes_no_gpu(tmp_path, monkeypatch):
    claimed = []
    monkeypatch.setattr(devices, "claim", lambda *_: claimed.append(1) or "0")
    monkeypatch.setattr(torch, "set_num_threads", claimed.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what a worker sets ends with the test
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    journal = Journal(tmp_path)
    for pid, expected in ((os.getpid(), []), (os.getpid() + 1, [1, 3])):  # here; in a worker
        info = Info("here", pid, str(tmp_path), gpus=["0"], threads=3)
        devices.settle(journal, info, "auto")
        assert claimed == expected
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == ("0" if expected else None)


def test_a_journal_says_who_lives(tmp_path):
    journal = Journal(tmp_path)
    entry = journal.begin(3, ["a=1"])
    assert journal.numbers() == [3] and journal.read(3).pid == os.getpid() and entry.lives
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    assert not Entry(4, [], "running", entry.host, dead.pid).lives
    assert Entry(4, [], "running", "elsewhere", dead.pid).lives
    journal.end(entry, 2.5, run_ids=["abc"])
    ended = journal.read(3)
    assert (ended.state, ended.run_ids, ended.seconds) == ("done", ["abc"], 2.5)
    (tmp_path / "5.json").write_text('{"number": 5, "overr')
    assert journal.read(5) is None


def test_what_dead_sweeps_left_goes_and_what_lives_stays(tmp_path):
    info = Info("here", os.getpid(), str(tmp_path))
    old, living, fresh, future = (Journal(tmp_path / "sweeps" / name) for name in "abcd")
    for journal in (old, living, fresh, future):
        journal.open(info)
    now = time.time()
    for journal, moved in ((old, -30), (living, -30), (future, 30)):  # days: the clock jumps
        with journal.lock:
            pass
        for path in (journal.folder, *journal.folder.iterdir()):
            os.utime(path, (now + moved * 86400,) * 2)
    with living.lock:
        for path in (living.folder, *living.folder.iterdir()):
            os.utime(path, (now - 30 * 86400,) * 2)
        Journal(tmp_path / "sweeps" / "e").open(info)
        assert {path.name for path in (tmp_path / "sweeps").iterdir()} == set("bcde")

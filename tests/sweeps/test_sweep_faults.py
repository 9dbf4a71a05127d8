"""Whatever happens to a sweep, every finished run is there once and the same command completes it.

All 30 kills: pytest tests/sweeps/test_sweep_faults.py --kills 30
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from conftest import what_is_recorded

pytestmark = pytest.mark.slow

SWEEP = (
    "-m", "+experiment=smoke", "model.width=4", "model.hidden=16", "train.epochs=1", "threads=1",
    "attack=noise,fgsm,pgd", "seed=0,1",
)  # fmt: skip
RUNS = 6
TOGETHER = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def start(folder, *words, limit=None):
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "robustbench_local", *SWEEP, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=prepare,
    )


def finish(folder, *words):
    job = start(folder, *words)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    return output


def numbers(folder):
    return what_is_recorded(folder / "results")


def check_complete(folder, expected):
    """Each run is there, once, with its numbers, and in the leaderboard; nothing else is left."""
    assert numbers(folder) == expected
    table = pd.read_csv(folder / "results/leaderboard.csv")
    listed = " ".join(table["run_ids"]).split()
    assert sorted(listed) == sorted(expected)
    assert not list((folder / "results").rglob("*.tmp"))
    assert not list(folder.rglob("*.damaged"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a sweep to which nothing happens, its numbers, and its seconds."""
    folder = tmp_path_factory.mktemp("unbroken")
    began = time.perf_counter()
    finish(folder)
    expected = numbers(folder)
    assert len(expected) == RUNS
    return folder, expected, time.perf_counter() - began


def running(folder):
    """The processes that say they run something, and live: dead sweeps have left their journals."""
    pids = []
    for path in (folder / "cache/sweeps").glob("*/[0-9]*.json"):
        try:
            entry = json.loads(path.read_text())
        except (OSError, ValueError):  # gone, or being replaced
            continue
        if entry["state"] == "running" and Path("/proc", str(entry["pid"])).exists():
            pids.append(entry["pid"])
    return pids


def test_workers_and_launchers_killed_at_random_moments(unbroken, tmp_path, request):
    _, expected, seconds = unbroken
    chance = random.Random(5)
    kills = {"worker": 0, "launcher": 0}
    total = request.config.getoption("--kills") or 2
    folder = tmp_path / "first"
    folder.mkdir()
    while sum(kills.values()) < total:
        job = start(folder, *TOGETHER)
        time.sleep(chance.uniform(0.2, 1.0) * seconds)
        whom = ("launcher", "worker")[sum(kills.values()) % 2]
        if whom == "worker":
            while not (pids := running(folder)) and job.poll() is None:
                time.sleep(0.02)
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), signal.SIGKILL)
                    kills[whom] += 1
            output, _ = job.communicate(timeout=300)
            assert job.returncode == 0, output  # it sees to that by itself
            assert "Traceback" not in output
        elif job.poll() is None:
            job.kill()
            job.communicate(timeout=300)  # its workers end, who hold what it prints to
            kills[whom] += 1
        else:
            job.communicate()
        for name, found in numbers(folder).items():
            assert found == expected[name]
        if len(numbers(folder)) == RUNS:
            finish(folder, *TOGETHER)
            check_complete(folder, expected)
            folder = tmp_path / f"after{sum(kills.values())}"
            folder.mkdir()
    finish(folder, *TOGETHER)
    check_complete(folder, expected)
    assert min(kills.values()) >= total // 2 - 1


def test_a_run_that_kills_its_process_every_time_is_given_up(tmp_path):
    """As the system does that has no memory left; the others are run all the same."""
    folder = tmp_path / "run"
    (folder / "own/model").mkdir(parents=True)
    (folder / "deadly.py").write_text(
        "import os, signal\nfrom robustbench_local.models import SmallCNN\n\n"
        "class Deadly(SmallCNN):\n    def __init__(self, input_shape, num_classes, deadly):\n"
        "        if deadly: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        super().__init__(input_shape=input_shape, num_classes=num_classes, width=4)\n"
    )
    own = ("model=custom", "model._target_=deadly.Deadly", "+model.deadly=false,true",
           "seed=0", "attack=noise")  # fmt: skip
    words = [word for word in SWEEP if not word.startswith(("model.", "seed", "attack"))]
    job = subprocess.run(
        [sys.executable, "-m", "robustbench_local", *words, *own, *TOGETHER],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert job.returncode == 1, job.stderr
    assert "Traceback" not in job.stderr
    assert "  deadly=True: its process was killed 3 times" in job.stderr
    (record,) = numbers(folder).values()
    assert record[0]["config"]["model"]["deadly"] is False


def test_a_disk_without_room_loses_nothing(unbroken, tmp_path):
    """The largest file that may be written is smaller than a record: as where no block is left."""
    before, expected, _ = unbroken
    folder = tmp_path / "run"
    shutil.copytree(before / "cache", folder / "cache")
    job = start(folder, limit=6000)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 1 and "Traceback" not in output
    assert f"{RUNS} of {RUNS} runs failed" in output and "File too large" in output
    assert numbers(folder) == {} and not list(folder.rglob("*.tmp"))
    finish(folder)
    check_complete(folder, expected)


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path):
    job = start(tmp_path, "paths.results=/proc/results")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert output.startswith("error: paths.results=/proc/results/records cannot be written")
    assert output.count("\n") == 1 and not list(tmp_path.iterdir())


def test_torn_records_and_lost_tables_come_back(unbroken, tmp_path):
    before, expected, _ = unbroken
    folder = tmp_path / "run"
    shutil.copytree(before, folder)
    torn, lost, edited = list(expected)[:3]
    records = folder / "results/records"
    text = (records / f"{torn}.json").read_text()
    (records / f"{torn}.json").write_text(text[: len(text) // 2])
    (records / f"{lost}.json").unlink()
    (records / f"{edited}.npz").write_bytes(b"not what was measured")
    (folder / "results/leaderboard.csv").unlink()
    output = finish(folder)
    assert output.count(f" of {RUNS}  ") == 3
    assert {name: found[0] for name, found in numbers(folder).items()} == {
        name: found[0] for name, found in expected.items()
    }
    listed = " ".join(pd.read_csv(folder / "results/leaderboard.csv")["run_ids"]).split()
    assert sorted(listed) == sorted(expected)


def test_two_launchers_on_one_folder(unbroken, tmp_path):
    _, expected, _ = unbroken
    jobs = [start(tmp_path), start(tmp_path)]
    for job in jobs:
        output, _ = job.communicate(timeout=300)
        assert job.returncode == 0, output
    check_complete(tmp_path, expected)
    assert len(list((tmp_path / "cache/weights").glob("*.json"))) == 2


def test_a_clock_that_jumps(unbroken, tmp_path):
    """By days, while it runs; and files that come from the future or from long ago."""
    before, expected, _ = unbroken
    code = (
        "import itertools, sys, time\n"
        "real, jumps = time.time, itertools.cycle((0, 3e6, -3e6, 86400, -1e9))\n"
        "time.time = lambda: real() + next(jumps)\n"
        f"sys.argv = ['robustbench_local', *{SWEEP!r}]\n"
        "from robustbench_local.__main__ import main\n"
        "main()\n"
    )
    jumping = tmp_path / "jumping"
    jumping.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=jumping, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_complete(jumping, expected)
    moved = tmp_path / "moved"
    shutil.copytree(before, moved)
    for path, shift in zip(sorted(moved.rglob("*")), [3e7, -3e8] * 1000, strict=False):
        os.utime(path, (time.time() + shift,) * 2)
    output = finish(moved)
    assert output.startswith(f"{RUNS} runs, {RUNS} of them recorded already")
    check_complete(moved, expected)


def test_ctrl_c_says_what_is_done(unbroken, tmp_path):
    _, expected, _ = unbroken
    job = start(tmp_path, *TOGETHER)
    while not list(tmp_path.glob("results/records/*.json")):
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 130, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("interrupted: ") and f" of {RUNS} runs are recorded" in last
    assert "Traceback" not in output
    assert not [path for path in Path(tmp_path, "cache/sweeps").iterdir() if running(tmp_path)]
    finish(tmp_path, *TOGETHER)
    check_complete(tmp_path, expected)


ORPHAN = """
import multiprocessing, os, sys, time

def work(launcher):
    while os.getppid() == launcher:
        time.sleep(0.01)
    from pathlib import Path
    from types import SimpleNamespace
    from unittest import mock
    from robustbench_local import run
    from robustbench_local.sweeps import devices, task
    from robustbench_local.sweeps.journal import Info, Journal

    def take_a_while(*arguments, **settings):
        time.sleep(1)
        print("the run ended", flush=True)
        return []

    journal = Journal(Path("journal").absolute())
    journal.open(Info(host="here", pid=launcher, folder=os.getcwd()))
    job = SimpleNamespace(num=0, overrides=SimpleNamespace(task=[]))
    with (
        mock.patch.object(task.HydraConfig, "get", lambda: SimpleNamespace(job=job, **vars(job))),
        mock.patch.object(devices, "settle"),
        mock.patch.object(run, "run_from_hydra", take_a_while),
    ):
        task._run_journalled(SimpleNamespace(device="cpu"), journal)
    time.sleep(60)
    print("still there", flush=True)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work, args=(os.getpid(),))
    child.start()
    os.kill(os.getpid(), 9)
"""


def test_a_worker_that_first_runs_when_its_launcher_is_dead_ends_after_that_run(tmp_path):
    """A child as joblib makes them: it knows its parent as `multiprocessing` does."""
    (tmp_path / "orphan.py").write_text(ORPHAN)
    job = subprocess.run(
        [sys.executable, "orphan.py"], cwd=tmp_path, stdout=subprocess.PIPE, timeout=50, text=True
    )
    assert job.returncode == -signal.SIGKILL
    assert job.stdout == "the run ended\n"

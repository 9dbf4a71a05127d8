"""A run killed at any moment resumes, loses nothing, and ends with an unbroken run's numbers.

More kills than in CI: pytest tests/cli/test_faults.py --kills 20
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

pytestmark = pytest.mark.slow

FEW = 6
"""Kills, two in each stage, where no other number is asked for."""

AT_ONCE = 2
"""Jobs side by side: each has one thread."""

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # their number decides how sums are rounded

# Some seconds of training and of attack each, for kills to hit.
JOB = (
    "+experiment=smoke",
    "model.width=4",
    "model.hidden=16",
    "train.epochs=6",
    "train.min_steps=150",
    "dataset.test_size=1000",
    "defense=adversarial_training",
)
STAGES = ("start", "training", "attack")
BRIEF = ("train.epochs=2", "train.min_steps=1")
LONG = ("attack.restarts=4", "attack.steps=60")
OLDER = ("attack=fgsm", "train.epochs=1", "train.min_steps=1")


def start(folder, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "robustbench_local", *JOB, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ONE_THREAD,
        # Whoever started the tests in the background had them, and their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(folder, *words):
    job = start(folder, *words)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    return output


def numbers(folder):
    """What a record says apart from times, and what happened to every example."""
    found = {}
    for path in sorted((folder / "results/records").glob("*.json")):
        record = json.loads(path.read_text())
        for key in ("finished", "seconds", "checksum"):
            record.pop(key)
        arrays = np.load(path.with_suffix(".npz"))
        found[path.stem] = (record, {key: arrays[key].tolist() for key in arrays})
    return found


def check_whole(folder, finished_runs):
    """The leaderboard, whenever there is one, is whole and has every finished run."""
    path = folder / "results/leaderboard.csv"
    if path.exists():
        table = pd.read_csv(path, dtype={"run_ids": str})  # some are digits alone
        assert len(table) >= 1
        listed = set(" ".join(table["run_ids"]).split())
        assert finished_runs <= listed


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with one finished run, which must never get lost."""
    folder = tmp_path_factory.mktemp("before")
    finish(folder, *OLDER)
    return folder


def stage(folder):
    """Where a run is, by what it has left so far."""
    if len(list((folder / "results/records").iterdir())) > 2:
        return "writing"
    if len(list((folder / "cache/weights").glob("*.json"))) > 1:
        return "attack"
    return "training" if list((folder / "cache/training").glob("*.pt")) else "start"


def wait_for(name, job, folder):
    """Seconds until the run has come so far, or ended."""
    began = time.perf_counter()
    while stage(folder) != name and job.poll() is None:
        time.sleep(0.01)
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def unbroken(before, tmp_path_factory):
    """The numbers of both runs where nothing is killed, and the seconds of each stage."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    shutil.copytree(before, folder)
    job = start(folder, *LONG)
    ends = ("training", "attack", "writing")
    seconds = dict(zip(STAGES, [wait_for(end, job, folder) for end in ends], strict=True))
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    return numbers(folder), seconds


@pytest.fixture(scope="module")
def brief(before, tmp_path_factory):
    """The same for a run of two epochs."""
    folder = tmp_path_factory.mktemp("brief") / "run"
    shutil.copytree(before, folder)
    finish(folder, *BRIEF)
    return numbers(folder)


def test_kill_at_random_moments(before, unbroken, tmp_path, request):
    kills = request.config.getoption("--kills") or FEW
    expected, seconds = unbroken
    older = set(numbers(before))
    # Always the same moments as shares of a stage: a failure can be had again.
    moments = random.Random(7)
    plan = [(STAGES[kill % 3], moments.uniform(0, 1)) for kill in range(kills)]

    def kill(number):
        name, moment = plan[number]
        folder = tmp_path / f"kill{number}"
        shutil.copytree(before, folder)
        job = start(folder, *LONG)
        wait_for(name, job, folder)
        time.sleep(moment * seconds[name])
        job.send_signal(signal.SIGKILL)
        job.communicate()
        hit = stage(folder)
        check_whole(folder, older)
        finish(folder, *LONG)
        assert numbers(folder) == expected
        check_whole(folder, set(expected))
        assert not list(folder.rglob("*.damaged"))
        return hit

    with ThreadPoolExecutor(AT_ONCE) as pool:
        stages = list(pool.map(kill, range(kills)))
    assert set(STAGES) <= set(stages), stages


def test_kill_at_every_write(before, brief, tmp_path):
    """Not left to chance: die before the n-th file of the run gets its name."""

    def kill(count):
        folder = tmp_path / f"write{count}"
        shutil.copytree(before, folder)
        code = (
            "import os, signal, sys\n"
            f"real, left = os.replace, [{count}]\n"
            "def deadly(*words, **keywords):\n"
            "    left[0] -= 1\n"
            "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(*words, **keywords)\n"
            "os.replace = deadly\n"
            f"sys.argv = ['robustbench_local', *{[*JOB, *BRIEF]!r}]\n"
            "from robustbench_local.__main__ import main\n"
            "main()\n"
        )
        killed = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, env=ONE_THREAD
        )
        assert killed.returncode == -signal.SIGKILL
        check_whole(folder, set(numbers(before)))
        finish(folder, *BRIEF)
        assert numbers(folder) == brief
        check_whole(folder, set(brief))
        assert not list(folder.rglob("*.tmp"))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(kill, range(1, 8)))


def test_ctrl_c_exits_130_and_goes_on_where_it_was(before, unbroken, tmp_path):
    expected, _ = unbroken
    folder = tmp_path / "run"
    shutil.copytree(before, folder)
    job = start(folder, *LONG)
    while not list(folder.glob("cache/training/*.pt")):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 130
    assert len(output.strip().splitlines()) == 1, output
    assert "Traceback" not in output
    assert not list(folder.rglob("*.tmp"))
    finish(folder, *LONG)
    assert numbers(folder) == expected

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import interrupted_training
import pytest
import torch

HERE = Path(__file__).parent


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    return subprocess.Popen(
        [sys.executable, "-c", "import interrupted_training as i; i.main()", str(cache)],
        # As many threads as here: other sums would round differently.
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever started the tests in the background had them, and their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_killed_training_ends_with_the_same_bytes(tmp_path):
    whole = interrupted_training.run(tmp_path / "whole")
    killed = start(tmp_path / "killed", KILL_AT="15")  # 6 steps an epoch: in the third one
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (state,) = (tmp_path / "killed" / "training").glob("*.pt")
    before = torch.load(state, weights_only=True)["course"]["history"]
    assert [entry["epoch"] for entry in before] == [1, 2]
    assert not list((tmp_path / "killed").glob("weights/*"))

    resumed = interrupted_training.run(tmp_path / "killed")
    assert resumed.sha256 == whole.sha256
    assert resumed.history[:2] == before  # their seconds too: these epochs were not run again
    assert resumed.key == whole.key and not resumed.cached
    assert not state.exists()
    timeless = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in trained.history]
        for trained in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_two_processes_train_once(tmp_path):
    first = start(tmp_path, MEET_IN=str(tmp_path))
    wait_for(lambda: list(tmp_path.glob("started-*")))
    second = start(tmp_path, MEET_IN=str(tmp_path))
    assert second.stderr is not None
    assert "waiting" in second.stderr.readline()
    (tmp_path / "go").touch()
    answers = [process.communicate()[0] for process in (first, second)]
    assert '"cached": false' in answers[0] and '"cached": true' in answers[1]
    assert answers[0].split('"sha256"')[1] == answers[1].split('"sha256"')[1]
    assert len(list(tmp_path.glob("started-*"))) == 1


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

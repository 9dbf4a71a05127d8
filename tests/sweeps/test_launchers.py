"""A sweep by every launcher: the same records, whatever carries the runs."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from conftest import what_is_recorded

from robustbench_local.__main__ import main
from robustbench_local.sweeps import sweep as sweeps

SMALL = ("+experiment=smoke", "model.width=4", "model.hidden=16", "train.epochs=2", "threads=1")

COUNTED = """
import os
from dataclasses import dataclass
from robustbench_local.defenses.recipe import Standard

@dataclass(frozen=True, kw_only=True)
class Counted(Standard):
    def begin(self):
        with open("epochs.txt", "a") as file:
            file.write(f"{os.getpid()}\\n")
        return self
"""


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call the command in an empty folder; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["robustbench_local", *words])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return call


def records(folder="results"):
    return what_is_recorded(folder)


@pytest.mark.slow
def test_processes_side_by_side_leave_the_same_records(cli):
    """Of one after the other, to the bit; every network is trained once, and classes of one's own
    are found."""
    Path("counted.py").write_text(COUNTED)
    Path("own/defense").mkdir(parents=True)
    Path("own/defense/counted.yaml").write_text("recipe: {counted: {_target_: counted.Counted}}\n")
    words = ("-m", "--config-dir", "own", *SMALL, "defense=counted", "attack=noise,fgsm,pgd")
    words = (*words, "seed=0,1")
    try:
        assert cli(*words)[0] == 0
        alone = Path("epochs.txt").read_text().split()
        assert len(alone) == 2 * 2  # epochs, seeds: attacks train nothing
        Path("epochs.txt").unlink()
        both = cli(*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
                   "paths.results=both", "paths.cache=other")  # fmt: skip
    finally:
        sys.modules.pop("counted", None)
    assert both[0] == 0, both[2]
    assert records("both") == records() and len(records()) == 6
    epochs = Path("epochs.txt").read_text().split()
    assert len(epochs) == 2 * 2
    assert len(set(epochs)) == 2 and str(os.getpid()) not in epochs  # each by another process
    assert "6 of 6  " in both[1] and "trains the same weights" not in both[2]
    (environment,) = {json.dumps(record["environment"]) for record, _ in records("both").values()}
    assert json.loads(environment)["threads"] == 1
    # Every process says what it has to say of a run through the journal alone.
    assert both[1].count("attack s") == 0
    assert not list(Path("other/sweeps").iterdir())


@pytest.mark.slow
def test_a_process_of_its_own_for_each_run(cli):
    local = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    code, out, err = cli("-m", *SMALL, *local, "attack=noise,fgsm,pgd", "threat.epsilon=0.1,0.2")
    assert code == 0, err
    assert len(records()) == 6 and "6 of 6  " in out
    assert len({record["weights"]["sha256"] for record, _ in records().values()}) == 1


def test_ray_runs_a_sweep(cli):
    pytest.importorskip("ray")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    code, out, err = cli("-m", *SMALL, "attack=noise,fgsm,pgd", "threat.epsilon=0.1,0.2",
                         "hydra/launcher=ray")  # fmt: skip
    assert code == 0, err
    assert len(records()) == 6 and "6 of 6  " in out


SBATCH = """#!{python}
# Keeps the file it is given, and does at once what it says, once for each task of the array.
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
open({kept!r}, "w").write(text)
last = int(re.search(r"#SBATCH --array=0-(\\d+)", text)[1])
for task in range(last + 1):
    told = dict(SLURM_JOB_ID=str(700 + task), SLURM_ARRAY_JOB_ID="700", SLURM_NTASKS="1",
                SLURM_ARRAY_TASK_ID=str(task), SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0",
                SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="here")
    subprocess.Popen(["bash", sys.argv[-1]], env={{**os.environ, **told}},
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 700")
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = """#!/usr/bin/env bash
echo "JobID|State|NodeList"
for task in 0 1; do echo "700_$task|RUNNING|here"; done
"""


@pytest.mark.slow
def test_the_slurm_preset_queues_an_array(cli, tmp_path, monkeypatch):
    """Slurm is made up here, and does what the file that it is given says."""
    (tmp_path / "bin").mkdir()
    kept = tmp_path / "sbatch.txt"
    sbatch = SBATCH.format(python=sys.executable, kept=str(kept))
    for name, text in (("sbatch", sbatch), ("srun", SRUN), ("sacct", SACCT)):
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    code, out, err = cli(
        "-m", *SMALL, "attack=noise,fgsm", "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpus", "hydra.launcher.timeout_min=30",
        "hydra.launcher.array_parallelism=1",
    )  # fmt: skip
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in kept.read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    wanted = {"array": "0-1%1", "cpus-per-task": "4", "gpus-per-node": "1", "mem": "16GB",
              "nodes": "1", "partition": "gpus", "time": "30",
              "job-name": "robustbench_local"}  # fmt: skip
    assert {key: options[key] for key in wanted} == wanted
    assert "cache/sweeps/" in options["output"]
    assert code == 0, err
    assert len(records()) == 2 and "2 of 2  " in out


def test_a_launcher_that_is_not_installed_is_told_in_a_sentence(cli, monkeypatch):
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)
    code, _, err = cli("-m", *SMALL, "seed=0,1", "hydra/launcher=joblib")
    assert code == 1
    assert err == (
        "error: hydra/launcher needs hydra-joblib-launcher, which is not installed; type "
        "pip install 'robustbench-local[joblib]'\n"
    )
    assert not Path("results").exists()


def test_a_launcher_that_launches_nothing_is_told_for_every_run(cli, monkeypatch):
    launcher = pytest.importorskip("hydra_plugins.hydra_joblib_launcher.joblib_launcher")

    def refuse(*words, **keywords):
        raise ConnectionError("the queue is closed.\nsecond line")

    monkeypatch.setattr(launcher.JoblibLauncher, "launch", refuse)
    code, _, err = cli("-m", *SMALL, "seed=0,1", "hydra/launcher=joblib")
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[:3] == [
        "error: 2 of 2 runs failed",
        "  seed=0: it could not be launched (ConnectionError: the queue is closed)",
        "  seed=1: it could not be launched (ConnectionError: the queue is closed)",
    ]


def test_numbers_do_not_hang_on_the_sweep(cli):
    """A run of a sweep is the run alone, and knows nothing of the other ones."""
    assert cli("-m", *SMALL, "attack=noise,fgsm", "hydra.sweeper.max_batch_size=1")[0] == 0
    assert cli(*SMALL, "attack=fgsm", "paths.results=alone")[0] == 0
    ((name, (record, arrays)),) = records("alone").items()
    assert records()[name] == (record, arrays)
    assert "threads" not in record["config"] and record["environment"]["threads"] == 1

"""Several processes that train one network end where one does."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trained_together
from safetensors.torch import load_file
from training_data import make_data

from robustbench_local import processes
from robustbench_local.building import choose_device
from robustbench_local.errors import UserError
from robustbench_local.training.store import trainings

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


@pytest.mark.slow
def test_the_weights_of_two_processes_are_those_of_one(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", "import trained_together as t; t.main()", tmp_path / "two"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(job.communicate(timeout=200)[0]) for job in jobs)
    assert first.pop("alone") == 1 and second.pop("alone") is None
    drawn = first.pop("drawn"), second.pop("drawn")
    assert first == second
    # Each draws its own, the first one what it would draw alone.
    for drawing, one, two in zip(
        (trained_together.Drawing(), trained_together.Perturbing()), *drawn, strict=True
    ):
        assert all(
            a != b for step in zip(one, two, strict=True) for a, b in zip(*step, strict=True)
        )
        trained_together.run(tmp_path / "one", drawing)
        assert one == drawing.drawn
    assert first["lost"][:2] == [False, 3]
    assert set(first["processes"]) == {2}
    assert first["cached"] == [False] * 6 + [True]
    unequal, diverged = first["errors"]
    assert unequal.endswith("expected a multiple of 2: type train.batch_size=24")
    assert diverged.startswith("TrainingDiverged: training diverged: the loss is nan in epoch 1")
    for name, recipe in trained_together.recipes().items():
        alone = trained_together.run(tmp_path / "one", recipe)
        assert alone.key == first["keys"][name] and alone.processes == 1
        one, two = (
            load_file(tmp_path / which / "weights" / f"{alone.key}.safetensors")
            for which in ("one", "two")
        )
        start = trained_together.network().state_dict()
        assert any((one[key] - value).abs().max() > 1e-2 for key, value in start.items())
        for key, value in one.items():
            assert torch.allclose(value, two[key], rtol=1e-3, atol=1e-4), (name, key)
        both = [
            json.loads((tmp_path / which / "weights" / f"{alone.key}.json").read_text())
            for which in ("one", "two")
        ]
        for a, b in zip(*(about["history"] for about in both), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["train_accuracy"] == pytest.approx(b["train_accuracy"], abs=0.02)
    assert len(trainings(tmp_path / "two")) == 10


@pytest.mark.slow
def test_without_torchrun_the_first_process_waits_for_who_comes_late():
    program = (
        "import time; from robustbench_local import processes as p\n"
        "time.sleep(2 * p.number()); print(p.agree(lambda: 'decided by ' + str(p.number())))"
    )
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [job.communicate(timeout=60)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert said == ["decided by 0\n"] * 2
    assert [job.returncode for job in jobs] == [0, 0]


def torchrun(folder, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               f"--master_port={free_port()}", "-m", "robustbench_local", *words]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


TINY = ("+experiment=smoke", "train.epochs=1", "dataset.test_size=20", "model.width=4")


@pytest.mark.slow
def test_torchrun_ends_with_one_record(tmp_path):
    code, output, said = torchrun(tmp_path, *TINY, "defense=[rse,adversarial_training]")
    assert code == 0, said
    assert said == ""
    assert output.count("recorded: run") == 1
    (file,) = (tmp_path / "results/records").glob("*.json")
    assert json.loads(file.read_text())["weights"]["processes"] == 2
    assert len(trainings(tmp_path / "cache")) == 1
    # Of what is recorded nobody trains anything; nor of a sweep's other runs.
    shutil.rmtree(tmp_path / "results")
    code, output, said = torchrun(tmp_path, "-m", *TINY, "seed=0,1", "attack=fgsm")
    assert code == 0, said
    assert len(list((tmp_path / "results/records").glob("*.json"))) == 2
    assert len(trainings(tmp_path / "cache")) == 3


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_all(tmp_path):
    for words in (("train.batch_size=33",), ("train.batches=1",)):
        code, output, said = torchrun(tmp_path, *TINY, *words)
        assert code != 0 and output == ""
        assert said.count("error: ") == 1, said


@pytest.mark.parametrize("here", [3, 4])
def test_every_process_has_a_gpu_of_its_own(monkeypatch, here):
    for name, value in {"RANK": "2", "WORLD_SIZE": here, "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    if here == 3:
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:2")
        assert choose_device("cpu") == torch.device("cpu")
        with pytest.raises(UserError, match="one GPU for 3 processes"):
            choose_device("cuda:1")
    else:
        with pytest.raises(UserError, match=r"4 processes .* 3 GPUs.*--nproc_per_node=3"):
            choose_device("auto")


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as other launchers set it
    monkeypatch.delenv("RANK", raising=False)
    assert processes.count() == 1 and processes.leads()
    with processes.together(torch.device("cpu")):
        assert processes.current() is None


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_is_dealt_whole(size):
    plan = trained_together.SCHEDULE.plan(len(make_data().train))
    parts = [processes.Group(rank, size).share(plan) for rank in range(size)]
    assert [row for part in parts for row in range(24)[part]] == list(range(24))

"""Shards on the command line: how they are typed, and what is printed."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from robustbench_local.__main__ import main

QUICK = ("+experiment=smoke", "model.width=2", "model.hidden=8", "train.epochs=1", "device=cpu",
         "dataset.test_size=40", "batch_size=10", "attack.steps=3")  # fmt: skip


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; gives what it prints, first results and then errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["robustbench_local", *words])
        capsys.readouterr()
        with suppress(SystemExit):
            main()
        captured = capsys.readouterr()
        return captured.out + captured.err

    return call


def test_shards_leave_one_record_whoever_carries_them(cli):
    out = cli(*QUICK, "shard=1/3")
    assert "shard 1/3 recorded: 10 images; missing: 2/3, 3/3" in out
    assert out.count("partial, of these images alone: clean ") == 1
    assert "95% interval" not in out
    assert "shard 1/3 of run" in cli("-m", *QUICK, "shard=1/3,4/3")
    out = cli("-m", *QUICK, "shard=1/3,2/3,3/3")
    assert "3 runs, 1 of them recorded already" in out
    assert "2 of 3  shard=2/3: recorded, the run is not whole yet" in out
    assert "3 of 3  shard=3/3: clean " in out and "n 40" in out
    (path,) = Path("results/records").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["n"], "shard" in record["config"]) == (40, False)
    assert "recorded before" in cli(*QUICK, "shard=2/3")
    assert f"run {record['run_id']}" in cli(*QUICK)
    assert "1 of them recorded already" in cli("-m", *QUICK, "shard=1/3,2/3,3/3")
    assert "type for example shard=1/4" in cli(*QUICK, "shard=4/3")

"""`audit=full` on the command line: what is recorded and printed."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from robustbench_local.__main__ import main
from robustbench_local.evaluation.audit import COSTLY, SEVERE, audit_attack

QUICK = ("+experiment=smoke", "model.width=4", "model.hidden=16", "train.epochs=1")
SMALL = ("audit.sample=20", "audit.noise_draws=5", "audit.black_box_queries=50")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; gives its output and the records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["robustbench_local", *words])
        capsys.readouterr()
        main()
        records = [json.loads(path.read_text()) for path in Path("results/records").glob("*.json")]
        return capsys.readouterr().out, records

    return call


def test_every_check_is_recorded_and_shown(cli):
    out, (record,) = cli(*QUICK, "audit=full", *SMALL)
    checks = {check["name"]: check for check in record["audit"]["checks"]}
    assert record["audit"]["level"] == "full"
    assert set(checks) == set(SEVERE)
    assert checks["not_converged"]["measured"]["n"] == 20
    assert checks["frozen_randomness"]["raised"] is None
    raised = [check for check in record["audit"]["checks"] if check["raised"]]
    assert record["flags"] == raised
    assert {"subset"} <= {flag["name"] for flag in raised}
    assert record["config"]["audit"]["sample"] == 20
    for name, check in checks.items():
        assert name in out
        assert check["why"][:40] in out
    for flag in ("raised, mild", "not raised", "not checked"):
        assert f"│ {flag}" in out
    told = sorted(flag["name"] + "*" * flag["severe"] for flag in raised)
    assert pd.read_csv("results/leaderboard.csv").loc[0, "flags"] == " ".join(told)


def test_a_check_that_breaks_down_leaves_the_record(cli, monkeypatch):
    def broken(case):
        raise IndexError("too many indices")

    monkeypatch.setitem(audit_attack.__globals__["_MADE"], "noise_as_strong", broken)
    _, (record,) = cli(*QUICK, "audit=full", *SMALL)
    checks = {check["name"]: check for check in record["audit"]["checks"]}
    check = checks["noise_as_strong"]
    assert check["raised"] is None
    assert check["why"] == "the check could not be made: IndexError too many indices"
    assert checks["weaker_than_fgsm"]["raised"] is not None


def test_the_cheap_level_says_what_it_left_out(cli):
    out, (record,) = cli(*QUICK)
    checks = {check["name"]: check for check in record["audit"]["checks"]}
    assert record["audit"]["level"] == "cheap"
    assert set(checks) == set(SEVERE)
    assert {name for name, check in checks.items() if check["raised"] is None} == {
        "eot_unstable",
        *COSTLY,
    }
    assert "weaker_than_fgsm" not in out
    # The costly checks leave the numbers of the evaluation alone.
    _, records = cli(*QUICK, "audit=full", *SMALL)
    assert len(records) == 2
    assert records[0]["robust_accuracy"] == records[1]["robust_accuracy"]
    assert records[0]["passes_per_attacked_image"] == records[1]["passes_per_attacked_image"]


def test_settings_that_cannot_be_are_told_before_anything_is_trained(cli, capsys):
    with pytest.raises(SystemExit):
        cli(*QUICK, "audit=full", "audit.sample=0")
    assert "audit.sample=0; expected a whole number from 1" in capsys.readouterr().err
    assert not Path("cache").exists()

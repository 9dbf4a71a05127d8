"""The command line, called in this process: starting one per case would cost seconds each."""

import sys
from dataclasses import dataclass

import pytest

from robustbench_local.__main__ import main


@dataclass
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call `cli("+experiment=smoke", ...)` in an empty folder; gives exit code and output."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["robustbench_local", *words])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
        captured = capsys.readouterr()
        return Finished(code or 0, captured.out, captured.err)

    return call

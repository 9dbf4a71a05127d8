"""What a person reads of a finished run, and in README about it."""

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from robustbench_local.display import output
from robustbench_local.evaluation.audit import COSTLY, SEVERE
from robustbench_local.results import Store
from robustbench_local.results.report import doubts, radius_in_words, show

ROOT = Path(__file__).parents[2]


@pytest.fixture
def record():
    """A shipped one, without doubts of its own."""
    store = Store(ROOT / "results" / "reference")
    return {**next(store.all()), "flags": []}


def flag(name, severe):
    return {"name": name, "severe": severe, "why": "so it is"}


def test_notes_mark_what_withholds_the_rank(record):
    def notes(*flags):
        console = Console(width=200, file=StringIO(), record=True)
        show([{**record, "flags": list(flags)}], console, leaderboard=Path("x"), recorded=0)
        return [line.strip() for line in console.export_text().splitlines()]

    mild, severe = flag("subset", False), flag("zero_gradient", True)
    told = notes(mild, severe)
    assert "note subset: so it is" in told
    assert "note zero_gradient*: so it is" in told
    assert sum(line.startswith("* a severe flag") for line in told) == 1
    assert not any("*" in line for line in notes(mild))
    assert doubts({**record, "flags": [severe]})[-1] == "zero_gradient*: so it is"


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(8 / 255, "8/255"), (0.3, "0.3"), (0.2, "0.2"), (1, "1"), (0.5, "0.5"), (0.0, "0"),
     (1.234567, "1.235"), (0.0313, "0.0313"), (1 / 255, "1/255")],
)  # fmt: skip
def test_a_radius_reads_as_people_write_it(epsilon, words):
    assert radius_in_words(epsilon) == words


def test_a_table_in_a_log_is_not_cut_to_a_terminal_that_is_not_there(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output().width == 160
    monkeypatch.setenv("COLUMNS", "100")
    assert output().width == 100


def test_readme_has_every_flag_and_marks_the_severe_ones():
    section = (ROOT / "README.md").read_text("utf-8")
    section = section.split("**The audit.**")[1].split("An attack of your own")[0]
    cheap, full = section.split("| with `audit=full`: | |")
    found = [re.findall(r"^\| `(\w+)`(\*?) \|", part, re.M) for part in (cheap, full)]
    named = {name: bool(star) for part in found for name, star in part}
    assert named == SEVERE
    assert [name for name, _ in found[1]] == list(COSTLY)

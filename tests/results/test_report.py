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
    """A shipped one, without doubts of its own, as a version that told no preparation wrote it."""
    store = Store(ROOT / "results" / "reference")
    found = next(each for each in store.all() if each["labels"]["norm"] == "l0")
    seconds = {part: spent for part, spent in found["seconds"].items() if part != "preparation"}
    return {**found, "seconds": seconds, "flags": []}


def flag(name, severe):
    return {"name": name, "severe": severe, "why": "so it is"}


def printed(records, *, width=200, said=None):
    console = Console(width=width, file=StringIO(), record=True)
    show(records, console, leaderboard=Path("x"), recorded=0, said=said)
    return [line.strip() for line in console.export_text().splitlines()]


def test_a_title_is_not_broken_to_the_width_of_its_table(record):
    labels = {**record["labels"], "defense": "adversarial_training+" * 5 + "jpeg"}
    told = printed([{**record, "labels": labels}])
    assert told[0].endswith(f"defense {labels['defense']}, l0 {labels['epsilon']:g}")
    assert len(told[0]) > len(told[1]) > 0


def test_notes_about_the_data_are_said_once_in_a_sweep(record):
    about = {**record["dataset"], "notes": ["the data are few"]}
    run = {**record, "dataset": about, "flags": [flag("subset", False), flag("oblivious", True)]}
    said = set()
    first, second = (printed([run], said=said) for _ in range(2))
    common = {"note the data are few", "note subset: so it is"}
    assert common < set(first) and not common & set(second)
    assert "note oblivious*: so it is" in first and "note oblivious*: so it is" in second
    other = {**run, "dataset": {**about, "notes": ["other data"]}}
    assert "note other data" in printed([other], said=said)


@pytest.mark.parametrize(
    ("labels", "threat", "told"),
    [
        ({"attack": "pgd"}, {}, "this attack alone ranks no row; type attack=standard"),
        ({"attack": "standard-seed1"}, {}, "this attack alone ranks no row; type attack=standard"),
        ({"attack": "standard"}, {}, None),
        ({"attack": "pgd", "awareness": "oblivious"}, {}, None),
        ({"attack": "few_pixel"}, {"norm": "l0"}, "no attack ranks a row under this threat model"),
        ({"attack": "square"}, {"query_budget": 9}, "no attack ranks a row under this"),
        ({"attack": "square"}, {"access": "scores"}, "no attack ranks a row under this"),
    ],
)
def test_a_run_whose_attack_ranks_nothing_says_what_would(record, labels, threat, told):
    usual = {"norm": "linf", "epsilon": 0.3, "access": "gradients", "query_budget": None}
    config = {**record["config"], "threat": {**usual, **threat}}
    labels = {**record["labels"], "awareness": "adaptive", **labels}
    run = {**record, "config": config, "labels": labels}
    notes = [line for line in printed([run]) if "provisional" in line]
    assert len(notes) == (told is not None)
    assert all(note.startswith(f"note provisional: {told}") for note in notes)


def test_seconds_of_preparation_are_told_where_a_user_waited(record):
    def prepared(*seconds):
        runs = [{**record, "seconds": {**record["seconds"], "preparation": s}} for s in seconds]
        return [line for line in printed(runs) if line.startswith("preparation")]

    assert "preparation" not in record["seconds"]  # a record of before
    assert not any("preparation" in line for line in printed([record]))
    assert prepared(0.9) == []
    assert prepared(152.3)[0].startswith("preparation: 152.3 s before the first image")
    # Radii prepared for at once, and each on its own.
    assert "152.3 s" in prepared(152.3, 152.3)[0]
    assert "3.5 s" in prepared(1.5, 2.0)[0]


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

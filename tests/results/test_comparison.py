"""The table at the end of a sweep, from records whose every number is known."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from test_leaderboard import add

from robustbench_local.results import Store, wilson
from robustbench_local.results.comparison import _show, compare, tabulate


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def written(store, run_id, robust, *, defense, attack, awareness="adaptive", **other):
    """A record as the store holds it; the order of the calls is that of the sweep."""
    add(store, run_id, robust, defense=defense, attack=attack, awareness=awareness, **other)
    return store.find(run_id)


def test_every_run_has_a_line_and_every_victim_its_worst_case(store):
    records = [
        written(store, "a", [1, 1, 0, 0], defense="jpeg", attack="pgd", awareness="oblivious"),
        written(store, "b", [0, 1, 1, 0], defense="jpeg", attack="pgd"),
        written(store, "c", [1, 1, 1, 0], defense="none", attack="pgd"),
    ]
    table = tabulate(store, records)
    assert list(table["defense"]) == ["jpeg"] * 3 + ["none"] * 2
    worst = table[table["attack"] == "worst_case"].set_index("defense")
    # Per example over both kinds of attack: the third is broken by the oblivious one alone.
    assert worst.loc["jpeg", "robust"] == 0.25
    assert worst.loc["none", "robust"] == 0.75
    assert (worst.loc["jpeg", "low"], worst.loc["jpeg", "high"]) == wilson(1, 4)[1:]
    assert worst.loc["jpeg", "run_id"] == "a b"


def test_attacks_under_another_threat_model_have_their_own_worst_case(store):
    records = [
        written(store, "a", [1, 0], defense="none", attack="pgd"),
        written(store, "b", [0, 0], defense="none", attack="one_pixel", norm="l0", epsilon=1),
    ]
    table = tabulate(store, records)
    worst = table[table["attack"] == "worst_case"].set_index("norm")["robust"]
    assert dict(worst) == {"linf": 0.5, "l0": 0.0}


def test_of_a_random_victim_the_strongest_attack_counts(store):
    one = written(store, "a", [0.9, 0.1], defense="noise", attack="pgd", judge_draws=10)
    two = written(store, "b", [0.1, 0.7], defense="noise", attack="fgsm", judge_draws=10)
    worst = tabulate(store, [one, two]).iloc[-1]
    assert worst["robust"] == pytest.approx(0.4)  # not 0.1, the least of both images


def test_a_run_met_twice_counts_once(store):
    record = written(store, "a", [1, 0], defense="none", attack="pgd")
    assert len(tabulate(store, [record, record])) == 2


def test_what_a_person_reads(store, tmp_path):
    records = [
        written(store, "a", [1, 1, 1, 1], defense="jpeg", attack="pgd", awareness="oblivious",
                flags=[("oblivious", True)]),
        written(store, "b", [0, 0, 0, 1], defense="jpeg", attack="pgd",
                flags=[("zero_gradient", True)]),
        written(store, "c", [0, 0, 0, 0], defense="none", attack="pgd"),
    ]  # fmt: skip
    console = Console(width=100, record=True, file=StringIO())
    _show(tabulate(store, records), console, tmp_path / "x.csv")
    text = console.export_text()
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "100.0 / 25.0*" in rows["jpeg"] and rows["jpeg"].split("│")[-2].strip() == "25.0"
    assert "= / 0.0" in rows["none"]
    assert "n = 4" in text and "x.csv" in text.replace("\n", "")


def test_the_file_holds_every_figure(store):
    records = [
        written(store, name, np.full(20, value), defense="none", attack=name)
        for name, value in (("fgsm", 1), ("pgd", 0))
    ]
    path = compare(records, str(store.folder))
    assert path.parent.name == "comparisons"
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("dataset,model,train,defense,seed")
    assert compare(records, str(store.folder)) == path

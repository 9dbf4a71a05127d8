"""The table at the end of a sweep, from records whose every number is known."""

from io import StringIO

import pandas as pd
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
    assert "100.0 / 25.0*" in rows["jpeg"] and rows["jpeg"].split("│")[-2].strip() == "25.0*"
    assert "= / 0.0" in rows["none"]
    assert "n = 4" in text and "x.csv" in text.replace("\n", "")


def shown(store, records):
    """The cells of the printed table, a row as a list, the heading first; and all that is said."""
    console = Console(width=200, record=True, file=StringIO())
    _show(tabulate(store, records), console, store.folder / "x.csv")
    text = console.export_text()
    rows = [line.replace("┃", "│").split("│") for line in text.splitlines() if line[0] in "┃│"]
    return [[cell.strip() for cell in row[1:-1]] for row in rows], text


def test_an_attack_that_did_less_is_marked(store):
    less = written(store, "a", [1, 0], defense="rse", attack="one_pixel", randomized=True)
    less["attack_report"] = {"reduced": "2 generations instead of 20"}
    whole = written(store, "b", [1, 0], defense="none", attack="one_pixel")
    rows, text = shown(store, [less, whole])
    assert [row[2] for row in rows[1:]] == ["50.0†", "50.0"]
    assert "† one_pixel: 2 generations instead of 20" in text


def test_long_names_break_between_words_and_radii_read_as_written(store):
    records = [
        written(store, "a", [1, 1], defense="adversarial_training+noise_fusion", attack="pgd"),
        written(store, "b", [1, 0], defense="none", attack="pgd"),
        written(store, "c", [1, 0], defense="none", attack="square", epsilon=8 / 255),
    ]
    console = Console(width=100, record=True, file=StringIO())
    _show(tabulate(store, records), console, store.folder / "x.csv")
    text = console.export_text()
    cells = [line.split("│")[1] for line in text.splitlines() if "│" in line]
    assert " ".join(cells).split() == ["adversarial", "training", "+", "noise", "fusion", "none"]
    assert "8/255" in text and "0.0314" not in text


@pytest.mark.parametrize("width", [60, 80])
def test_in_a_narrow_terminal_a_table_goes_on_below_itself(store, width):
    attacks = ["fgsm", "pgd", "mi_fgsm", "noise", "square", "substitute-epochs1"]
    records = [
        written(store, f"{attack}{radius}{aware[0]}", [1, 1, 1, 0], attack=attack, awareness=aware,
                defense="adversarial_training+noise_fusion", epsilon=radius)
        for attack in attacks for radius in (0.1, 8 / 255) for aware in ("oblivious", "adaptive")
    ]  # fmt: skip
    console = Console(width=width, record=True, file=StringIO())
    _show(tabulate(store, records), console, store.folder / "x.csv")
    lines = console.export_text().splitlines()
    table = [line for line in lines if line[0] in "┃│┏┡└"]
    assert max(map(len, table)) <= width and "…" not in "".join(table)
    assert sum(line[0] == "└" for line in table) > 1
    figures = " ".join(table).replace("│", " ").split()
    assert figures.count("75.0") == 2 * 2 * len(attacks) + 2  # and the worst cases
    for word in ("adversarial", "training", "fusion", "substitute-epochs1", "8/255"):
        assert word in " ".join(table).replace("┃", " ").replace("│", " ").split()


def test_a_table_with_detectors_says_what_counts_as_robust(store, capsys):
    record = written(store, "a", [1, 0], defense="detector", attack="pgd")
    compare([record], str(store.folder))
    assert "rejecting" not in capsys.readouterr().out
    compare([{**record, "detection": {"clean_rejected": 0.1}}], str(store.folder))
    assert "rejecting an attacked image counts as robust" in capsys.readouterr().out


def test_the_limits_told_are_the_farthest_from_any_figure(store):
    """Wilson's interval of 0 of 4 reaches from 0 to 0.49, and none of 2 of 4 so far."""
    records = [
        written(store, "a", [0, 0, 0, 0], defense="none", attack="pgd"),
        written(store, "b", [1, 1, 0, 0], defense="none", attack="fgsm"),
    ]
    _, text = shown(store, records)
    assert f"95% limits at most {100 * wilson(0, 4).high:.1f} points away" in text


def test_a_worst_case_carries_the_doubts_of_its_attacks(store):
    """But not that an attack was oblivious, which the column says."""
    records = [
        written(store, "a", [1, 1], defense="jpeg", attack="pgd", awareness="oblivious",
                flags=[("oblivious", True), ("subset", False)]),
        written(store, "b", [1, 0], defense="jpeg", attack="pgd", flags=[("randomized", True)]),
        written(store, "c", [1, 0], defense="jpeg", attack="fgsm", flags=[("randomized", True)]),
    ]  # fmt: skip
    worst = tabulate(store, records).iloc[-1]
    assert (worst["severe"], worst["flags"]) == (1, "oblivious* randomized* subset")


@pytest.mark.parametrize(
    ("one", "other", "heads"),
    [
        ({"access": "scores"}, {"access": "gradients"}, ["square scores", "square gradients"]),
        (
            {"query_budget": None},
            {"query_budget": 50},
            ["square unlimited queries", "square 50 queries"],
        ),
    ],
)
def test_attacks_that_may_do_more_have_a_column_and_a_worst_case_of_their_own(
    store, one, other, heads
):
    records = [
        written(store, "a", [1, 0], defense="none", attack="square", **one),
        written(store, "b", [0, 1], defense="none", attack="square", **other),
    ]
    table = tabulate(store, records)
    worst = table[table["attack"] == "worst_case"]
    assert list(worst["robust"]) == [0.5, 0.5] and list(worst["run_id"]) == ["a", "b"]
    (heading, row), _ = shown(store, records)
    assert heading[2:4] == heads and row[2:] == ["50.0"] * 4


def test_runs_that_no_name_tells_apart_are_all_shown(store):
    """A sweep over what is in no label, such as judge_draws."""
    random = {"defense": "noise", "attack": "pgd"}
    records = [
        written(store, "a", [1, 0.8], judge_draws=10, **random),
        written(store, "b", [1, 0], judge_draws=1, flags=[("randomized", True)], **random),
        written(store, "c", [1, 1], judge_draws=10, awareness="oblivious", **random),
    ]
    (_, row), text = shown(store, records)
    assert row[-2:] == ["100.0 / 90.0, 50.0*", "50.0*"]
    assert "several figures" in text
    assert "several figures" not in shown(store, records[1:])[1]


@pytest.mark.parametrize(
    ("key", "values", "told"),
    [
        ("weights", ("a" * 64, "b" * 64), ["a" * 8, "b" * 8]),
        ("learned", ({"denoiser": "a" * 64}, {"denoiser": "b" * 64}),
         ["same+aaaaaaaa", "same+bbbbbbbb"]),
        ("test", ("a" * 64, "b" * 64), ["a" * 8, "b" * 8]),
    ],
)  # fmt: skip
def test_other_weights_or_test_images_are_other_rows(store, key, values, told):
    records = [
        written(store, run_id, robust, defense="none", attack="pgd", **{key: value})
        for run_id, robust, value in zip("ab", ([1, 0], [0, 0]), values, strict=True)
    ]
    (_, *rows), _ = shown(store, records)
    assert rows == [["none", told[0], "100.0", "50.0", "50.0"],
                    ["none", told[1], "100.0", "0.0", "0.0"]]  # fmt: skip


def test_a_sweep_over_the_size_of_the_test_set_has_a_row_for_each(store):
    records = [
        written(store, "a", [1, 0], defense="none", attack="pgd", test="few"),
        written(store, "b", [1, 1, 1, 0], defense="none", attack="pgd", test="many"),
    ]
    (heading, *rows), text = shown(store, records)
    assert heading == ["n", "clean", "pgd", "worst case"]
    assert rows == [["2", "100.0", "50.0", "50.0"], ["4", "100.0", "75.0", "75.0"]]
    assert "n = 2 or 4" in text


def test_the_file_holds_every_figure(store):
    records = [
        written(store, "a", [1, 1, 1, 0], clean=[1, 1, 1, 0], defense="none", attack="fgsm"),
        written(store, "b", [0.5, 0.5, 0, 0], defense="none", attack="pgd", awareness="oblivious",
                judge_draws=10, averaged=20, flags=[("oblivious", True), ("randomized", True)]),
    ]  # fmt: skip
    path = compare(records, str(store.folder))
    assert path.parent.name == "comparisons"
    assert compare(records, str(store.folder)) == path
    common = {
        "dataset": "mnist", "model": "small_cnn", "train": "mnist", "defense": "none", "seed": 0,
        "weights": "same", "test": "the test", "norm": "linf", "epsilon": 0.3,
        "access": "gradients", "query_budget": "", "n": 4,
    }  # fmt: skip
    columns = (
        "attack", "awareness", "clean", "robust", "low", "high", "judge_draws", "eot_samples",
        "reduced", "flags", "severe", "run_id",
    )  # fmt: skip
    none, one = wilson(3, 4), wilson(1, 4)
    expected = [
        ("fgsm", "adaptive", 0.75, *none, 1, "", "", "", 0, "a"),
        ("pgd", "oblivious", 1.0, *one, 10, 20.0, "", "oblivious* randomized*", 1, "b"),
        ("worst_case", "any", 0.75, *one, 1, "", "", "oblivious* randomized*", 1, "a b"),
    ]
    read = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    assert read == [
        {
            key: str(value)
            for key, value in {**common, **dict(zip(columns, line, strict=True))}.items()
        }
        for line in expected
    ]

"""What `python -m robustbench_local.results` does for whoever types it."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from test_leaderboard import examples, record

from robustbench_local.results import Store, fold, wilson
from robustbench_local.results.__main__ import main
from robustbench_local.results.compare import p_in_words
from robustbench_local.results.compare import robust as kept_by
from robustbench_local.results.finding import side
from robustbench_local.results.statistics import accuracy, p_difference
from robustbench_local.results.summary import summarise
from robustbench_local.results.tables import escape_latex, escape_markdown
from robustbench_local.results.worst_case import worst_case

FULL = {
    "perturbation": {"norm": "linf", "images": 3, "mean": 0.1, "median": 0.1, "max": 0.3},
    "environment": {"device": "cpu", "packages": {"torch": "2.9"}},
    "metrics": None,
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path / "results")


@pytest.fixture
def cli(store, capsys):
    def call(*words):
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def add(store, run_id, robust, *, threat=None, **keywords):
    outcome = examples(robust, keywords.pop("clean", None))
    labels = dict(epsilon=0.3, awareness="adaptive", access="gradients", norm="linf", test="a")
    labels |= keywords
    budget = keywords.get("query_budget")
    key = "-".join(str(labels[name]) for name in ("norm", "epsilon", "access", "awareness", "test"))
    whole = record(run_id, outcome, **{"comparability": f"{key}-{budget}", **keywords})
    whole |= FULL
    whole["weights"]["warnings"] = []
    whole["dataset"]["notes"] = []
    store.add(whole, outcome)


def rows(n=1000, *, first=882, second=0):
    """Outcomes that keep the first so many images."""
    places = np.arange(n)
    return (places < first) * 1.0, (places < second) * 1.0


def one_sentence(err):
    """The error, which is one line that says what to type."""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert "type " in lines[0]
    return lines[0]


def test_no_command_folds_and_says_what_was_found(store, cli):
    for run_id in ("a1", "b2", "c3"):
        add(store, run_id, [1, 1, 0, 0], defense=run_id)
    (store.records / "c3.npz").write_bytes(b"torn")
    code, out, err = cli()
    assert code == 0
    assert out.startswith("2 records counted; 1 not counted, named above")
    assert "c3.json is not counted" in err and "leaderboard.csv" in out
    assert "b2" in pd.read_csv(store.folder / "leaderboard.csv").defense.to_list()


def test_without_records_there_is_a_sentence(cli, tmp_path):
    for words in ((), ("show",), ("show", "ab"), ("compare", "a", "b"),
                  ("export", "--format", "csv")):  # fmt: skip
        code, _, err = cli(*words)
        assert code == 1 and "type --results DIR" in one_sentence(err)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "words",
    [("shw",), ("export",), ("export", "--format", "xls"), ("show", "--nope", "x"), ("compare",)],
)
def test_what_argparse_refuses_is_a_sentence_too(store, cli, words):
    add(store, "a1", [1, 0])
    code, _, err = cli(*words)
    assert code == 1 and "--help" in one_sentence(err)


def test_unknown_run_ids_suggest_near_ones(store, cli):
    for run_id in ("abcd1234", "abce9999", "ffff0000"):
        add(store, run_id, [1, 0], defense=run_id)
    assert "abcd1234" in one_sentence(cli("show", "abcf1234")[2])
    assert "2 runs begin with abc" in one_sentence(cli("show", "abc")[2])
    assert "ls " in one_sentence(cli("show", "zzzzzzzz")[2])
    code, out, _ = cli("show", "ffff")
    assert code == 0 and "ffff0000" in out


@pytest.mark.parametrize("width", ["60", "100", "200"])
def test_the_leaderboard_fits_the_terminal(store, cli, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    add(store, "a1", [1, 1, 1, 0], defense="adversarial_training+noise_fusion", attack="square",
        flags=[("zero_gradient", True)])  # fmt: skip
    add(store, "b2", [1, 0, 0, 0], defense="none", attack="pgd")
    add(store, "c3", [1, 0, 0, 0], defense="none", attack="square", epsilon=8 / 255)
    code, out, _ = cli("show")
    assert code == 0 and "8/255" in out and "75.0 (" in out and "zero_gradient*" in out
    assert max(len(line) for line in out.splitlines() if line[:1] in "┃│┏┡└├") <= int(width)
    words = set(re.findall(r"[\w.]+", out))
    assert {"adversarial_training", "noise_fusion", "provisional"} <= words
    assert "none" not in cli("show", "--attack", "square", "--epsilon", "0.3")[1].split()


def test_tables_of_one_title_say_what_keeps_them_apart(store, cli):
    for name in ("one", "other"):
        add(store, name, [1, 0], defense=name, comparability=f"key-{name}")
    add(store, "third", [1, 0], epsilon=0.1)
    titles = [line for line in cli("show")[1].splitlines() if line.startswith("mnist,")]
    assert [title.partition(", n 2")[2] for title in titles] == [
        ", comparability key-one", ", comparability key-other", "",
    ]  # fmt: skip


def test_radii_are_typed_and_told_as_people_write_them(store, cli):
    add(store, "a1", [1, 0], defense="jpeg", epsilon=8 / 255)
    add(store, "a2", [1, 0], defense="jpeg", epsilon=0.3)
    for typed in ("abc", "0.2"):
        told = one_sentence(cli("show", "--epsilon", typed)[2])
        assert f"epsilon={typed} is in no record" in told and "expected one of 8/255, 0.3" in told
        assert "type --epsilon " in told
        told = one_sentence(cli("compare", f"defense=jpeg,epsilon={typed}", "a1")[2])
        assert "expected one of 0.3, 8/255: type epsilon=" in told
    assert "(0.3, 8/255)" in one_sentence(cli("compare", "defense=jpeg", "a1")[2])
    shown = cli("show", "--epsilon", "8/255")[1]
    assert "linf 8/255" in shown and "linf 0.3" not in shown


def test_filters_that_match_nothing_suggest(store, cli):
    add(store, "a1", [1, 0], defense="jpeg")
    assert "type --defense jpeg" in one_sentence(cli("show", "--defense", "jpg")[2])
    assert "type --attack pgd" in one_sentence(cli("show", "--attack", "pdg")[2])
    assert "expected one of the two" in one_sentence(cli("show", "a1", "--attack", "pgd")[2])


def test_one_record_in_full(store, cli):
    add(store, "a1", [1, 1, 0, 0], defense="jpeg", flags=[("subset", False)])
    flag = store.find("a1")["flags"][0]
    assert "why" not in flag  # of the test's record
    whole = store.find("a1")
    whole["flags"][0]["why"] = "measured on 4 of 10 images"
    store.add(whole, store.examples("a1"))
    code, out, _ = cli("show", "a1")
    low, high = wilson(2, 4)[1:]
    assert code == 0 and f"{100 * low:.2f} to {100 * high:.2f}" in out
    for told in (
        "measured on 4 of 10",
        "defense jpeg",
        "torch: '2.9'",
        "spread: 0.0001",
        "mean: 0.1",
    ):
        assert told in out


def test_compare_gives_a_sentence_to_quote(store, cli):
    robust, naked = rows()
    add(store, "aa", robust, defense="adversarial_training")
    add(store, "bb", naked, defense="none")
    code, out, _ = cli("compare", "aa", "defense=none")
    assert code == 0
    (said,) = [line for line in out.splitlines() if line.startswith("On the same")]
    for told in ("On the same 1,000 images of mnist", "against pgd",
                 "adversarial_training keeps 88.2% where none keeps 0.0%", "88.2 points more",
                 "exact McNemar p < 1e-200", "882 images only the first keeps, 0 only the second",
                 "one training seed each, so nothing is said about training noise."):  # fmt: skip
        assert told in said
    low, high = map(float, re.search(r"interval ([\d.]+) to ([\d.]+)", said).groups())
    assert low == pytest.approx(86.1, abs=0.3) and high == pytest.approx(90.1, abs=0.3)
    turned = cli("compare", "bb", "aa")[1]
    assert "88.2 points less (95% interval" in turned and "0 images only the first" in turned
    assert cli("compare", "aa", "bb")[1] == out


def test_several_attacks_count_by_their_worst_case(store, cli):
    add(store, "a1", [1, 1, 0, 0] * 25, defense="jpeg", attack="fgsm")
    add(store, "a2", [1, 0, 1, 0] * 25, defense="jpeg", attack="pgd")
    add(store, "b1", [1, 1, 1, 1] * 25, defense="none", attack="fgsm")
    add(store, "b2", [1, 1, 1, 0] * 25, defense="none", attack="pgd")
    code, out, _ = cli("compare", "defense=jpeg", "defense=none")
    assert code == 0 and "the worst case of fgsm, pgd" in out
    assert "jpeg keeps 25.0% where none keeps 75.0%: 50.0 points less" in out
    assert (
        "jpeg keeps 50.0%"
        in cli("compare", "defense=jpeg,attack=pgd", "defense=none,attack=pgd")[1]
    )
    error = one_sentence(cli("compare", "defense=jpeg,attack=pgd", "defense=none")[2])
    assert "other attacks" in error and "attack=pgd in both" in error
    code, out, _ = cli("compare", "defense=jpeg,attack=pgd", "defense=none", "--anyway")
    assert code == 0 and "note" in out and "under pgd" in out


def test_several_seeds_are_a_matrix(store, cli):
    generator = np.random.default_rng(0)
    drawn = {name: (generator.random((3, 200)) < share) * 1.0
             for name, share in (("jpeg", 0.7), ("none", 0.3))}  # fmt: skip
    for name, matrix in drawn.items():
        for seed, robust in enumerate(matrix):
            add(store, f"{name}{seed}", robust, defense=name, seed=seed, weights=f"{name}{seed}")
    code, out, _ = cli("compare", "defense=jpeg", "defense=none")
    assert code == 0 and "3 seeds of the first and 3 seeds of the second" in out
    assert p_in_words(p_difference(drawn["jpeg"], drawn["none"])) in out
    assert "t-test over images and seeds" in out and "only the second (in most seeds)" in out
    code, out, _ = cli("compare", "defense=jpeg", "defense=none,seed=0")
    assert "which says nothing about the training noise of the one with one" in out


def test_a_seed_that_has_not_met_every_attack_is_left_out_and_named(store, cli):
    for seed, attacks in ((0, ("fgsm", "pgd")), (1, ("pgd",)), (2, ("fgsm",))):
        for attack in attacks:
            add(store, f"{attack}{seed}", [1, 0] * 50, defense="jpeg", attack=attack, seed=seed,
                weights=f"w{seed}")  # fmt: skip
    add(store, "b", [1, 1] * 50, defense="none", attack="fgsm")
    add(store, "c", [1, 1] * 50, defense="none", attack="pgd")
    code, out, _ = cli("compare", "defense=jpeg", "defense=none")
    assert code == 0
    assert "note seeds 1, 2 have not met every attack of defense=jpeg and are left out" in out
    out = cli("compare", "defense=jpeg,attack=pgd", "defense=none,attack=pgd")[1]
    assert "left out" not in out


def test_draws_that_images_share_count_in_a_comparison(store, cli):
    """Two random victims whose draws turn half of the images at once, each for itself."""
    generator = np.random.default_rng(3)
    kept = {}
    for name in ("noise", "rse"):
        turned = generator.random(10) < 0.5
        draws = np.tile(np.arange(200)[:, None] < 100, (1, 10)) | turned
        outcome = replace(examples(draws.mean(1)), clean_draws=draws, robust_draws=draws)
        known = record(name, outcome, attack="pgd", judge_draws=10, defense=name)
        store.add({**known, "randomized": True}, outcome)
        kept[name] = draws
    code, out, _ = cli("compare", "noise", "rse")
    assert code == 0 and "t-test over images and draws p = " in out
    both = tuple(kept.values())
    outcomes = [draws.mean(1) for draws in both]
    assert p_in_words(p_difference(*outcomes, draws=both)) in out
    assert p_difference(*outcomes, draws=both) > 0.1 > p_difference(*outcomes)


def test_of_a_selection_counts_what_counts_in_the_leaderboard(store, cli):
    """Seeds that have met every attack; the latest of one made again, or stronger evidence."""
    half, none = rows(100, first=50)[0], rows(100, first=0)[0]
    day = "2026-01-0{}T00:00:00".format
    add(store, "a1", rows(100, first=90)[0], defense="jpeg", attack="pgd", finished=day(1))
    add(store, "a2", half, defense="jpeg", attack="pgd", finished=day(2))
    add(store, "a3", rows(100, first=80)[0], defense="jpeg", attack="fgsm")
    add(store, "b1", rows(100, first=100)[0], defense="jpeg", attack="fgsm", seed=1)
    add(store, "c1", none, defense="none", attack="pgd")
    add(store, "c2", none, defense="none", attack="fgsm")
    for words in (("defense=jpeg", "defense=none"), ("defense=none", "defense=jpeg")):
        out = cli("compare", *words)[1]
        assert "jpeg keeps 50.0%" in out and "one training seed each" in out
    add(store, "d1", half * 0.5, defense="noise", judge_draws=10, averaged=80, finished=day(1))
    add(store, "d2", half, defense="noise", judge_draws=10, averaged=20, finished=day(2))
    assert "noise keeps 25.0%" in cli("compare", "defense=noise", "c1")[1]


def test_three_are_compared_in_pairs_after_holm(store, cli):
    for name, kept in (("a", 60), ("b", 50), ("c", 48)):
        add(store, name, rows(100, first=kept)[0], defense=name)
    code, out, _ = cli("compare", "a", "b", "c")
    assert code == 0 and out.count("On the same") == 3 and "p (Holm)" in out
    p_values = sorted(2 * 0.5**discordant for discordant in (10, 12, 2))
    adjusted = np.maximum.accumulate(np.array(p_values) * [3, 2, 1])
    for p_value in np.minimum(adjusted, 1):
        assert f"after Holm {p_in_words(p_value)};" in out


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"epsilon": 0.1}, "differ in epsilon (0.3 and 0.1)"),
        ({"norm": "l2"}, "differ in norm (linf and l2)"),
        ({"access": "labels"}, "differ in access (gradients and labels)"),
        ({"query_budget": 7}, "differ in query_budget (None and 7)"),
        ({"test": "b"}, "other test images"),
        ({"awareness": "oblivious"}, "differ in awareness (adaptive and oblivious)"),
        ({"comparability": "else"}, "judged by other rules"),
    ],
)
def test_what_is_not_comparable_is_refused(store, cli, other, told):
    add(store, "aa", [1, 0], defense="jpeg")
    add(store, "bb", [1, 1], defense="none", **other)
    code, _, err = cli("compare", "aa", "bb")
    assert code == 1 and told in err
    one_sentence(err)
    anyway = cli("compare", "aa", "bb", "--anyway")
    if "awareness" in other:
        assert anyway[0] == 0 and "oblivious attack shows no robustness" in anyway[1]
    else:
        assert anyway[0] == 1 and anyway[2] == err


def test_who_may_reject_images_is_not_compared_with_who_may_not(store, cli):
    add(store, "aa", [1, 0], defense="jpeg")
    add(store, "bb", [1, 1], defense="detector", awareness="oblivious")
    whole = store.find("bb")
    store.add({**whole, "detection": {"clean_rejected": 0.1}}, store.examples("bb"))
    for words in ((), ("--anyway",)):
        told = one_sentence(cli("compare", "aa", "bb", *words)[2])
        assert "one of them may reject images" in told


def test_other_training_data_is_noted_where_the_key_of_comparability_is_not_asked(store, cli):
    """That key holds the awareness too, so that --anyway passes over it."""
    add(store, "aa", [1, 0], defense="jpeg")
    add(store, "bb", [1, 1], defense="none", awareness="oblivious")
    assert "other training data" not in cli("compare", "aa", "bb", "--anyway")[1]
    whole = store.find("bb")
    whole["dataset"]["fingerprint"] = "of another"
    store.add(whole, store.examples("bb"))
    assert "note aa and bb were measured with other training data" in cli(
        "compare", "aa", "bb", "--anyway"
    )[1]  # fmt: skip


def test_selections_that_mean_nothing_or_too_much(store, cli):
    add(store, "a1", [1, 0], defense="jpeg", epsilon=0.1)
    add(store, "a2", [1, 0], defense="jpeg", epsilon=0.3)
    assert "epsilon=0.1" in one_sentence(cli("compare", "defense=jpeg", "a1")[2])
    assert "defense=jpeg" in one_sentence(cli("compare", "defense=jpge", "a1")[2])
    assert "defense=jpeg" in one_sentence(cli("compare", "defence=jpeg", "a1")[2])
    add(store, "b1", [1, 0], defense="none", epsilon=0.1, access="labels")
    told = one_sentence(cli("compare", "defense=jpeg,access=labels", "a1")[2])
    assert "each part of it selects some" in told and "type fewer" in told
    assert "expected two victims" in one_sentence(cli("compare", "a1")[2])


def test_the_worst_case_is_that_of_the_leaderboard(store):
    """Deterministic and random victims, several attacks: the mean is the one that is ranked.

    So are the limits, also where draws that the images share have widened them.
    """
    generator = np.random.default_rng(1)
    for run, attack in enumerate(("fgsm", "pgd", "square")):
        draws = generator.random((200, 10)) < generator.random((200, 1))
        draws[:, : 4 - run] = False  # of all images
        outcome = replace(examples(draws.mean(1)), clean_draws=draws, robust_draws=draws)
        known = record(f"r{run}", outcome, attack=attack, judge_draws=10, defense="noise")
        known["robust_accuracy"] = accuracy(outcome.robust_correct, draws)._asdict()
        store.add({**known, "randomized": True}, outcome)
        add(store, f"d{run}", generator.random(200) < 0.6, attack=attack, defense="none")
    for defense in ("noise", "none"):
        one = side(store, f"defense={defense}")
        worst = worst_case(store, [summarise(record) for record in one.all_records])
        assert one.outcomes.mean() == pytest.approx(worst.images.mean(), abs=1e-12)
        line = fold(store).set_index("defense").loc[defense]
        assert one.outcomes.mean() == pytest.approx(line.worst_case, abs=1e-12)
        limits = (line.worst_case, line.worst_case_low, line.worst_case_high)
        assert kept_by(one) == pytest.approx(limits, abs=1e-12)


NASTY = r"a|b_c&d%e$f#g{h}i~j^k\l<m>n*o[p]--q"


@pytest.fixture
def nasty(store):
    add(store, "a1", [1, 1, 0, 0], defense=NASTY, attack="pgd", flags=[("zero_gradient", True)])
    add(store, "b2", [1, 0, 0, 0], defense="none", attack="square")
    return fold(store)


def test_csv_and_json_say_all_of_the_leaderboard(nasty, store, cli, tmp_path):
    code, out, _ = cli("export", "--format", "csv")
    assert code == 0
    pd.testing.assert_frame_equal(
        pd.read_csv(StringIO(out)), pd.read_csv(StringIO(nasty.to_csv(index=False)))
    )
    code, out, _ = cli("export", "--format", "json")
    lines = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert code == 0 and [line["defense"] for line in lines] == nasty.defense.to_list()
    assert lines[0]["square"] is None and lines[0]["pgd"] == 0.5 == lines[0]["worst_case"]
    assert lines[0]["worst_case_low"] == nasty.worst_case_low[0]  # to the last digit
    target = tmp_path / "there" / "table.json"
    code, said, _ = cli("export", "--format", "json", "--output", str(target))
    assert code == 0 and said == "" and target.read_text() == out
    assert len(json.loads(cli("export", "--format", "json", "--defense", "none")[1])) == 1


def test_markdown_keeps_its_columns_and_names(nasty, cli):
    code, out, _ = cli("export", "--format", "md")
    assert code == 0
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in out.splitlines()]
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == {" --- "}
    cells = dict(zip(lines[0], lines[2], strict=True))
    shown = re.sub(r"\\([^\w\s])", r"\1", cells[" defense "].strip())
    assert shown == NASTY
    low, high = wilson(2, 4)[1:]
    assert (
        cells[" worst\\_case ".replace("\\", "")] == f" 50.0 ({100 * low:.1f} to {100 * high:.1f}) "
    )
    assert cells[" flags "].strip() == r"zero_gradient\*"


def test_latex_keeps_its_columns_and_names(nasty, cli):
    code, out, _ = cli("export", "--format", "latex")
    assert code == 0 and r"\toprule" in out and out.startswith("% needs")
    lines = [line for line in out.splitlines() if line.endswith(r"\\")]
    assert len({len(re.split(r"(?<!\\)&", line)) for line in lines}) == 1
    assert escape_latex(NASTY) in lines[1]
    body = out.split("\n", 1)[1]
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert not re.search(r"(?<!\\)[%$#_]", body.replace("& ", ""))
    names = {r"\textbackslash": "\\", r"\textasciitilde": "~", r"\textasciicircum": "^",
             r"\textbar": "|", r"\textless": "<", r"\textgreater": ">"}  # fmt: skip
    printed = re.sub(r"(\\text\w+)\{\}", lambda found: names[found[1]].replace("\\", "\\\\"),
                     escape_latex(NASTY))  # fmt: skip
    printed = re.sub(r"\{([\[\]*])\}", r"\1", printed).replace("-{}", "-")
    assert re.sub(r"\\([{}&%$#_\\])", r"\1", printed) == NASTY


def test_escapes_leave_plain_names_alone():
    assert escape_markdown("adversarial_training+noise") == "adversarial_training+noise"
    assert escape_markdown("_x_") == r"\_x\_"
    assert escape_latex("small cnn 8/255") == "small cnn 8/255"
    assert escape_latex("two\nlines") == escape_markdown("two\nlines") == "two lines"


def test_an_export_that_cannot_be_written_is_a_sentence(nasty, cli, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli("export", "--format", "md", "--output", str(tmp_path / "file" / "x"))
    assert code == 1 and "cannot be used" in one_sentence(err)


def test_ctrl_c_leaves_nothing_torn(nasty, cli, store, monkeypatch):
    cli()
    before = (store.folder / "leaderboard.csv").read_bytes()

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", interrupted)
    code, _, err = cli()
    assert code == 130 and "interrupted: nothing is torn" in err
    assert (store.folder / "leaderboard.csv").read_bytes() == before
    assert not list(store.folder.glob(".*.tmp"))


def test_help_is_light_and_names_every_command(tmp_path):
    best = 60.0
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "robustbench_local.results", "--help"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        best = min(best, time.perf_counter() - began)
    assert done.returncode == 0 and best < 1
    for command in ("show", "compare", "merge", "export", "reproduce"):
        assert command in done.stdout


def test_what_a_comparison_prints_survives_a_narrow_terminal(store, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    add(store, "aa", rows()[0], defense="adversarial_training")
    add(store, "bb", rows()[1], defense="none")
    out = cli("compare", "aa", "bb")[1]
    assert max(len(line) for line in out.splitlines() if line[:1] in "┃│┏┡└├") <= 60
    assert "86." in out and "1e-200" in out
    for name in ("a", "b", "c", "d"):
        add(store, name, rows()[0], defense=f"adversarial_training_{name}")
    monkeypatch.setenv("COLUMNS", "80")
    out = cli("compare", "a", "b", "c", "d")[1]
    table = [line for line in out.splitlines() if line[:1] in "┃│┏┡└├"]
    assert max(map(len, table)) <= 80 and "…" not in out
    for name in ("a", "b", "c", "d"):  # whole, in the table of victims
        assert f"│ adversarial_training_{name} " in out
    pairs = re.findall(r"^│ (\d - \d) │", out, re.MULTILINE)
    assert pairs == ["1 - 2", "1 - 3", "1 - 4", "2 - 3", "2 - 4", "3 - 4"]


def test_a_sentence_names_what_tells_its_own_two_apart(store, cli):
    """What tells a third from them says nothing in it."""
    add(store, "aa", rows()[0], defense="trades", attack="standard")
    add(store, "bb", rows()[1], defense="none", attack="standard")
    add(store, "cc", rows()[1], defense="none", attack="pgd")
    out = cli("compare", "aa", "bb", "cc")[1]
    assert "under linf 0.3 against standard, trades keeps 88.2% where none keeps 0.0%" in out
    assert (
        "0.3, none under standard keeps 0.0% where none under pgd keeps 0.0%: 0.0 points apart"
        in out
    )
    assert "trades under standard keeps 88.2% where none under pgd keeps 0.0%" in out


def test_merging_tells_what_became_of_each_record(store, cli, tmp_path):
    there = Store(tmp_path / "other")
    for run_id in ("same", "torn", "else"):
        add(there, run_id, [1, 0], defense=run_id)
    add(store, "same", [1, 0], defense="same")
    (there.records / "torn.json").write_text("half")
    code, out, _ = cli("merge", str(there.folder))
    assert code == 0 and "1 added, 1 there already, 0 in conflict, 1 damaged" in out
    assert "damaged: torn.json: it is torn" in out and "2 records counted" in out
    assert set(pd.read_csv(store.folder / "leaderboard.csv").defense) == {"same", "else"}
    add(there, "same", [1, 1], defense="same")
    code, out, _ = cli("merge", str(there.folder))
    assert code == 1 and "0 added, 1 there already, 1 in conflict, 1 damaged" in out
    assert "conflict: run same: " in out and "value is 0.5 here and 1.0 there" in out
    assert store.find("same")["robust_accuracy"]["value"] == 0.5

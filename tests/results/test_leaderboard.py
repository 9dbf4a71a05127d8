"""The leaderboard is folded from records alone, exactly and safely."""

import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from robustbench_local.errors import UserError
from robustbench_local.evaluation import PerExample
from robustbench_local.results import Store, fold, wilson, write_leaderboard
from robustbench_local.results.statistics import accuracy
from robustbench_local.results.store import RECORD_VERSION, check_writable


def examples(robust, clean=None):
    robust = np.asarray(robust, float)
    n = len(robust)
    clean = np.ones(n) if clean is None else np.asarray(clean, float)
    whole = np.zeros(n, np.int64)
    size, target = np.zeros(n), whole - 1
    said = np.zeros((n, 3), np.float16)
    return PerExample(
        np.arange(n), whole, clean, robust, whole, whole, clean > 0, size, target, said, said
    )


def record(
    run_id,
    outcome,
    *,
    attack="pgd",
    seed=0,
    finished="2026-01-01T00:00:00",
    flags=(),
    cleared=(),
    judge_draws=1,
    averaged=None,
    audit=None,
    learned=None,
    warnings=(),
    test="the test images",
    query_budget=None,
    **labels,
):
    """Checks are `flags`, (name, severe) each, and those `cleared`; no others were made."""
    n = len(outcome.labels)
    raised = [{"name": name, "severe": severe, "raised": True} for name, severe in flags]
    found_nothing = [{"name": name, "severe": True, "raised": False} for name in cleared]
    names = {
        "dataset": "mnist", "model": "small_cnn", "train": "mnist", "defense": "none",
        "norm": "linf", "epsilon": 0.3, "access": "gradients", "awareness": "adaptive",
    }  # fmt: skip
    return {
        "version": RECORD_VERSION,
        "run_id": run_id,
        "finished": finished,
        "comparability": labels.pop("comparability", "key"),
        "weights": {"sha256": labels.pop("weights", "same"), "warnings": list(warnings)},
        "labels": {**names, **labels, "attack": attack},
        "seed": seed,
        "n": n,
        "clean_accuracy": wilson(outcome.clean_correct.sum(), n)._asdict(),
        "robust_accuracy": wilson(outcome.robust_correct.sum(), n)._asdict(),
        "judge_draws": judge_draws,
        "eot": averaged and {"samples": averaged},
        "flags": raised,
        "audit": {"checks": [*raised, *found_nothing, {"name": "left_out", "raised": None}]},
        "learned": {name: {"sha256": sha256} for name, sha256 in (learned or {}).items()},
        "dataset": {"test_fingerprint": test},
        "config": {
            "audit": {"level": "full", "sample": 100, "spread": 1e-4, **(audit or {})},
            "threat": {"query_budget": query_budget},
        },
    }


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def add(store, run_id, robust, **keywords):
    outcome = examples(robust, keywords.pop("clean", None))
    store.add(record(run_id, outcome, **keywords), outcome)


def test_worst_case_is_per_example_then_averaged(store):
    add(store, "a", [1, 1, 0, 0], attack="fgsm")
    add(store, "b", [1, 0, 1, 0], attack="pgd")
    (line,) = fold(store).to_dict("records")
    assert (line["fgsm"], line["pgd"], line["worst_case"]) == (0.5, 0.5, 0.25)
    assert [line["worst_case_low"], line["worst_case_high"]] == list(wilson(1, 4)[1:])
    assert line["clean_accuracy"] == 1.0
    assert line["run_ids"] == "a b"
    assert line["status"] == "provisional"


def test_a_training_that_went_wrong_is_among_the_flags(store):
    add(store, "a", [1, 0], warnings=["validation_at_chance: it has learnt nothing"],
        flags=[("subset", False)])  # fmt: skip
    (line,) = fold(store).to_dict("records")
    assert line["flags"] == "subset validation_at_chance"


def test_seeds_are_averaged_and_worst_cases_taken_within_a_seed(store):
    add(store, "a", [1, 0], attack="fgsm", seed=0)
    add(store, "b", [0, 1], attack="pgd", seed=0)
    add(store, "c", [1, 1], attack="fgsm", seed=1)
    add(store, "d", [1, 1], attack="pgd", seed=1)
    (line,) = fold(store).to_dict("records")
    assert (line["seeds"], line["fgsm"], line["worst_case"]) == ("0 1", 0.75, 0.5)


def test_a_seed_that_met_less_lifts_nothing(store):
    add(store, "a", [1, 1], attack="noise", seed=0)
    add(store, "b", [0, 0], attack="standard", seed=0)
    add(store, "c", [1, 1], attack="noise", seed=1)
    (line,) = fold(store).to_dict("records")
    assert (line["seeds"], line["noise"], line["worst_case"]) == ("0", 1.0, 0.0)
    assert line["status"] == "ranked"


def test_while_no_seed_has_met_every_attack_the_worst_seed_stands(store):
    add(store, "a", [1, 0], attack="standard", seed=0)
    add(store, "b", [1, 1], attack="noise", seed=1)
    (line,) = fold(store).to_dict("records")
    assert (line["worst_case"], line["status"]) == (0.5, "incomplete")
    assert line["worst_case"] <= min(line["standard"], line["noise"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"weights": "old"}, {"weights": "new"}),
        ({"learned": {"denoiser": "old"}}, {"learned": {"denoiser": "new"}}),
        ({}, {"learned": {"denoiser": "new"}}),
    ],
)
def test_two_networks_never_share_a_cell(store, old, new):
    """Neither two classifiers nor two denoisers in front of one."""
    add(store, "a", [0, 0], attack="fgsm", finished="2026-01-01T00:00:00", **old)
    add(store, "b", [1, 0], attack="pgd", finished="2026-01-02T00:00:00", **new)
    (line,) = fold(store).to_dict("records")
    assert (line["worst_case"], line["run_ids"]) == (0.5, "b")


def test_a_cell_run_twice_counts_once_the_latest(store):
    """A run is named by the code too: what was mended since counts."""
    add(store, "old", [0, 0], finished="2026-01-01T00:00:00")
    add(store, "new", [1, 1], finished="2026-01-02T00:00:00")
    (line,) = fold(store).to_dict("records")
    assert (line["pgd"], line["run_ids"]) == (1.0, "new")


def test_weaker_evidence_about_a_random_victim_replaces_nothing(store):
    """Draws of the judge and draws averaged are in no name: the lowest of the latest counts."""
    days = (f"2026-01-{day:02}T00:00:00" for day in range(1, 9))
    add(store, "a", [0.0, 0.0], judge_draws=10, averaged=80, finished=next(days))
    add(store, "b", [0.4, 0.2], judge_draws=10, averaged=80, finished=next(days))
    add(store, "fewer", [0.9, 0.9], judge_draws=10, averaged=20, finished=next(days))
    add(store, "once", [1, 1], judge_draws=1, averaged=80, finished=next(days))
    (line,) = fold(store).to_dict("records")
    assert (line["pgd"], line["worst_case"], line["run_ids"]) == (
        pytest.approx(0.3), pytest.approx(0.3), "b",
    )  # fmt: skip
    add(store, "more", [0.2, 0.2], judge_draws=10, averaged=160, finished=next(days))
    (line,) = fold(store).to_dict("records")
    assert (line["pgd"], line["run_ids"]) == (pytest.approx(0.2), "more")


@pytest.mark.parametrize(
    ("later", "status"),
    [
        ({}, "withheld"),  # audit=cheap: the check was left out
        ({"judge_draws": 10}, "withheld"),
        ({"cleared": ["noise_as_strong"]}, "withheld"),
        ({"cleared": ["weaker_than_fgsm"]}, "ranked"),
        ({"cleared": ["weaker_than_fgsm"], "audit": {"level": "cheap"}}, "ranked"),
        ({"cleared": ["weaker_than_fgsm"], "audit": {"sample": 200}}, "ranked"),
        ({"cleared": ["weaker_than_fgsm"], "audit": {"sample": 5}}, "withheld"),
        ({"cleared": ["weaker_than_fgsm"], "audit": {"spread": 1.0}}, "withheld"),
        ({"flags": [("weaker_than_fgsm", False)]}, "withheld"),
    ],
)
def test_a_severe_flag_stands_until_the_same_check_finds_nothing(store, later, status):
    """Running the attack again with less checking takes no doubt back."""
    severe = [("weaker_than_fgsm", True), ("subset", False)]
    add(store, "full", [1, 1], attack="standard", flags=severe, finished="2026-01-01T00:00:00")
    add(store, "later", [1, 1], attack="standard", finished="2026-01-02T00:00:00", **later)
    (line,) = fold(store).to_dict("records")
    withheld = status == "withheld"
    assert line["status"] == status
    assert ("weaker_than_fgsm*" in line["flags"].split()) == withheld
    assert ("full" in line["run_ids"].split()) == withheld  # where the doubt can be read


def test_a_flag_that_comes_back_stands(store):
    for day, found in enumerate(("flags", "cleared", "flags"), 1):
        how = {"flags": [("zero_gradient", True)]} if found == "flags" else {
            "cleared": ["zero_gradient"]
        }  # fmt: skip
        add(store, f"{day}", [1, 1], attack="standard", finished=f"2026-01-0{day}", **how)
    (line,) = fold(store).to_dict("records")
    assert (line["status"], line["run_ids"]) == ("withheld", "3")


def test_sorted_by_worst_case_within_a_comparability_key(store):
    add(store, "a", [0, 0, 1], defense="weak", comparability="k1")
    add(store, "b", [1, 1, 1], defense="strong", comparability="k1")
    add(store, "c", [1, 1, 0], defense="other", comparability="k2")
    assert fold(store)["defense"].tolist() == ["strong", "weak", "other"]


def test_a_severe_flag_withholds_the_rank(store):
    add(store, "a", [1, 1], attack="standard", defense="good")
    add(store, "b", [1, 0], attack="standard", flags=[("zero_gradient", True), ("subset", False)])
    table = fold(store).set_index("defense")
    assert table.loc["good", "status"] == "ranked"
    assert table.loc["none", "status"] == "withheld"
    assert table.loc["none", "flags"] == "subset zero_gradient*"


@pytest.mark.parametrize(
    ("attack", "judge_draws", "status"),
    [
        ("pgd", 1, "provisional"),
        ("standard", 1, "ranked"),
        ("standard-steps9", 1, "provisional"),
        ("autoattack", 1, "ranked"),
        ("standard", 10, "ranked"),
    ],
)
def test_a_cascade_that_fits_the_victim_ranks_a_row(store, attack, judge_draws, status):
    add(store, "a", [1, 0], attack=attack, judge_draws=judge_draws)
    add(store, "b", [1, 0], attack="fgsm", judge_draws=judge_draws)
    (line,) = fold(store).to_dict("records")
    assert line["status"] == status


def test_of_a_random_victim_the_strongest_attack_counts_and_one_good_cascade_is_enough(store):
    """The least of several noisy shares would fall with every attack added."""
    single_draw = {"flags": [("randomized", True)], "judge_draws": 10}
    averaged = {"cleared": ["randomized"], "judge_draws": 10}
    add(store, "a", [0.9, 0.2, 0.4, 0.5], attack="standard", **averaged)
    add(store, "b", [0.5, 0.9, 0.9, 0.9], attack="noise", **single_draw)
    (line,) = fold(store).to_dict("records")
    assert line["worst_case"] == line["standard"] == pytest.approx(0.5)
    assert (line["status"], line["flags"]) == ("ranked", "randomized*")


def test_a_seed_answers_for_itself(store):
    """What was found sound of one network says nothing about another."""
    single_draw = {"flags": [("randomized", True)], "judge_draws": 10}
    averaged = {"cleared": ["randomized"], "judge_draws": 10}
    add(store, "a", [0.5, 0.5], attack="standard", seed=0, **averaged)
    add(store, "b", [1, 1], attack="standard", seed=1, **single_draw)
    (line,) = fold(store).to_dict("records")
    assert (line["seeds"], line["status"]) == ("0 1", "withheld")
    later = {"finished": "2026-01-02T00:00:00", **averaged}
    add(store, "c", [0.5, 0.5], attack="standard", seed=1, **later)
    (line,) = fold(store).to_dict("records")
    assert line["status"] == "ranked"


def test_draws_that_images_share_widen_the_worst_case_as_they_do_the_attack(store):
    """Ten draws turn all 400 images together: the worst case is that attack, and no surer."""
    draws = np.tile(np.arange(10) < 6, (400, 1))
    outcome = replace(examples(draws.mean(1)), clean_draws=draws, robust_draws=draws)
    known = record("a", outcome, attack="standard", judge_draws=10)
    known["robust_accuracy"] = accuracy(outcome.robust_correct, draws)._asdict()
    store.add({**known, "randomized": True}, outcome)
    (line,) = fold(store).to_dict("records")
    for end in ("", "_low", "_high"):
        assert line[f"worst_case{end}"] == pytest.approx(line[f"standard{end}"], abs=1e-12)
    assert line["worst_case_high"] - line["worst_case_low"] > 0.5


def test_cascades_that_are_doubted_do_not_absolve_each_other(store):
    one, other = "weaker_than_black_box", "unconstrained_failure"
    add(store, "a", [1, 1], attack="standard", flags=[(one, True)], cleared=[other])
    add(store, "b", [1, 1], attack="autoattack", flags=[(other, True)], cleared=[one])
    (line,) = fold(store).to_dict("records")
    assert line["status"] == "withheld"


def test_a_random_victim_without_averages_is_withheld(store):
    flagged = {"flags": [("randomized", True)], "judge_draws": 10}
    add(store, "a", [1, 0], attack="standard", **flagged)
    (line,) = fold(store).to_dict("records")
    assert line["status"] == "withheld"


@pytest.mark.parametrize(
    ("doubted", "flag", "made", "status"),
    [
        ("fgsm", "weaker_than_black_box", True, "ranked"),
        ("fgsm", "weaker_than_black_box", False, "withheld"),
        ("fgsm", "unconstrained_failure", True, "ranked"),
        ("standard", "weaker_than_black_box", True, "withheld"),
        ("fgsm", "zero_gradient", True, "withheld"),
        ("fgsm", "gradient_switch", True, "withheld"),
    ],
)
def test_a_doubt_about_one_attack_is_answered_by_a_stronger_one(store, doubted, flag, made, status):
    """One about the victim, or about the cascade itself, is not; nor by a check left out."""
    for attack in ("fgsm", "standard"):
        severe = [(flag, True)] if attack == doubted else [("not_converged", False)]
        cleared = [flag] if attack != doubted and made else []
        add(store, attack, [1, 0], attack=attack, flags=severe, cleared=cleared)
    (line,) = fold(store).to_dict("records")
    assert (line["status"], line["flags"]) == (
        status,
        " ".join(sorted(["not_converged", flag + "*"])),
    )


def test_a_flag_is_as_severe_as_its_most_severe_finding(store):
    """Saturation is mild for an attack that does not notice it, in whatever order they come."""
    for place, attacks in enumerate((("art", "standard"), ("standard", "art"))):
        for attack in attacks:
            flags = [("zero_gradient", attack == "art")]
            add(store, f"{place}{attack}", [1, 0], attack=attack, seed=place, flags=flags)
    (line,) = fold(store).to_dict("records")
    assert line["status"] == "withheld"


def test_different_rows_do_not_merge(store):
    add(store, "a", [1, 1])
    add(store, "b", [0, 0], train="mnist-epochs1")
    add(store, "c", [0, 0], epsilon=0.1)
    assert len(fold(store)) == 3


def test_a_lost_or_torn_leaderboard_is_rebuilt(store):
    add(store, "a", [1, 0])
    path = write_leaderboard(store)
    good = path.read_bytes()
    path.write_bytes(good[:20])
    assert write_leaderboard(store).read_bytes() == good
    path.unlink()
    assert write_leaderboard(store).read_bytes() == good
    assert pd.read_csv(path)["pgd"].tolist() == [0.5]


def test_damaged_records_are_named_and_not_counted(store):
    for run_id in "abcd":
        add(store, run_id, [1, 0], defense=run_id)
    (store.records / "a.json").write_text('{"version": 1, "run_')
    (store.records / "b.npz").write_bytes(b"nothing")
    foreign = json.loads((store.records / "c.json").read_text())
    (store.records / "c.json").write_text(json.dumps({**foreign, "run_id": "x"}))
    with pytest.warns(UserWarning, match="not counted") as caught:
        table = fold(store)
    assert table["defense"].tolist() == ["d"]
    assert sorted(str(w.message).split()[1] for w in caught) == ["a.json", "b.json", "c.json"]
    assert store.find("a") is None  # set aside
    assert store.find("d")["run_id"] == "d"
    assert store.find("never") is None


def test_an_empty_store_gives_an_empty_table(store):
    assert len(fold(store)) == 0
    assert write_leaderboard(store).exists()


def _write(folder, worker):
    store = Store(folder)
    for k in range(5):
        add(store, f"{worker}-{k}", [1, 0], defense=f"{worker}-{k}")
        write_leaderboard(store)


@pytest.mark.slow
def test_parallel_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(tmp_path, w)) for w in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(pd.read_csv(tmp_path / "leaderboard.csv")) == 15


def test_a_folder_that_cannot_be_written_is_an_error_that_writes_nothing(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(
        UserError, match=r"paths.results=.* cannot be written .*type paths.results="
    ):
        check_writable(file / "results", "paths.results")
    check_writable(tmp_path / "new" / "results", "paths.results")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]

"""Ranks with ties, and what a line says beside accuracies."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from test_leaderboard import add, record
from test_leaderboard import examples as outcome_of

from robustbench_local.results import Store, fold, leaderboard, ranking, wilson
from robustbench_local.results.ranking import ranks
from robustbench_local.results.worst_case import WorstCase

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
IMAGES = 400


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def kept(count, *, of=IMAGES):
    """The first `count` images are kept: rows differ in as many images as in their counts."""
    return np.arange(of) < count


def rows(*counts):
    """One seed each, of a victim that is not random."""
    return [[WorstCase(kept(count))] for count in counts]


def by_hand(counts):
    """The rule in README, with McNemar's test from scipy."""
    level, leader, found = 0.05 / (len(counts) - 1), 0, [1]
    for place in range(1, len(counts)):
        apart = counts[leader] - counts[place]
        if apart and binomtest(apart, apart, 0.5).pvalue < level:
            leader = place
        found.append(leader + 1)
    return found


def test_rows_that_images_do_not_tell_apart_share_a_rank():
    # Five tests at 1% each: nothing against 8 images is significant (p 0.0078), nor is 0 against 7.
    assert ranks(rows(200, 193, 192, 190, 184, 0)) == [1, 1, 3, 3, 5, 6]


def test_no_chain_of_small_steps_ties_rows_that_differ():
    """Each row is near the one before it, and the last far from the first."""
    counts = list(range(300, 240, -4))
    found = ranks(rows(*counts))
    assert found == by_hand(counts)
    leaders = sorted(set(found))
    assert found == sorted(found) and len(leaders) > 3
    for leader in leaders:
        tied = [count for count, rank in zip(counts, found, strict=True) if rank == leader]
        assert tied[0] - tied[-1] < 16  # 16 images on one side are significant at 5% / 14


def test_every_row_is_tested_against_one_leader_only(monkeypatch):
    """The number of tests that are made is what the level is divided by."""
    asked = []

    def no_difference(first, second, draws):
        asked.append((first.sum(), second.sum()))
        return 0.06 / 19 if second.sum() % 2 else 0.04 / 19

    monkeypatch.setattr(ranking, "p_difference", no_difference)
    counts = [20, 19, 18, 17, *range(15, -1, -1)]
    assert ranks(rows(*counts))[:5] == [1, 1, 3, 3, 3]
    assert asked[:4] == [(20, 19), (20, 18), (18, 17), (18, 15)]
    assert len(asked) == 19


def test_random_rows_that_draw_once_for_all_images_share_a_rank(store):
    """Two victims of the same kind, each of whose draws moves all images by five points."""
    generator = np.random.default_rng(4)
    for pair in range(20):
        for side in "ab":
            level = np.clip(generator.normal(0.6, 0.05, 10), 0, 1)
            draws = generator.random((IMAGES, 10)) < level
            outcome = replace(outcome_of(draws.mean(1)), clean_draws=draws, robust_draws=draws)
            found = record(f"{pair}{side}", outcome, attack="standard", defense=side,
                           judge_draws=10, comparability=str(pair))  # fmt: skip
            store.add({**found, "randomized": True}, outcome)
    table = fold(store)
    assert len(table) == 40 and table["rank"].notna().all()
    apart = (table["rank"] == 2).sum()
    assert apart <= 3, table[["comparability", "defense", "worst_case", "rank"]]


def test_few_rows():
    assert ranks([]) == []
    assert ranks(rows(3)) == [1]
    assert ranks(rows(90, 90)) == [1, 1]


def test_only_ranked_rows_have_a_rank_and_only_among_those_comparable(store):
    add(store, "a", kept(300), attack="standard", defense="best")
    add(store, "b", kept(298), attack="standard", defense="near")
    add(store, "c", kept(100), attack="standard", defense="far")
    add(store, "d", kept(400), attack="pgd", defense="provisional")
    add(store, "e", kept(400), attack="standard", defense="doubted", flags=[("noisy", True)])
    add(store, "f", kept(50), attack="standard", defense="elsewhere", comparability="other")
    table = fold(store).set_index("defense")
    assert table["rank"].dropna().to_dict() == {"best": 1, "near": 1, "far": 3, "elsewhere": 1}
    text = (leaderboard.write_leaderboard(store)).read_text()
    assert ",local,1,ranked," in text and ",local,,provisional," in text


def test_the_worst_case_ranks_and_not_the_clean_accuracy(store):
    add(store, "a", kept(100), clean=kept(400), attack="standard", defense="accurate")
    add(store, "b", kept(300), clean=kept(350), attack="standard", defense="robust")
    assert fold(store)["defense"].tolist() == ["robust", "accurate"]
    assert fold(store)["rank"].tolist() == [1, 2]


def test_a_line_tells_mean_spread_and_worst_seed_and_what_it_cost(store):
    for seed, count in enumerate((300, 280, 260)):
        for attack, passes in (("fgsm", 2.0), ("standard", 50.0 + seed)):
            outcome = outcome_of(kept(400 if attack == "fgsm" else count))
            found = record(f"{attack}{seed}", outcome, attack=attack, seed=seed)
            found["passes_per_attacked_image"] = {"forward": passes, "backward": 1.0}
            found["seconds"] = {"training": 10.0 * (seed + 1), "attack": passes / 2}
            found["weights"]["parameters"] = 1234
            store.add(found, outcome)
    (line,) = fold(store).to_dict("records")
    assert (line["worst_case"], line["worst_case_worst_seed"]) == (pytest.approx(0.7), 0.65)
    assert line["worst_case_sd"] == pytest.approx(0.05)  # of 0.75, 0.7 and 0.65
    assert (line["worst_case_low"], line["worst_case_high"]) == wilson(280, IMAGES)[1:]
    assert line["queries"] == 2 + 51
    assert (line["training_seconds"], line["attack_seconds"]) == (20, 1 + 25.5)
    assert (line["parameters"], line["seeds"], line["origin"]) == (1234, "0 1 2", "local")


def test_one_seed_tells_no_spread(store):
    add(store, "a", kept(300), attack="standard")
    (line,) = fold(store).to_dict("records")
    assert np.isnan(line["worst_case_sd"]) and line["worst_case_worst_seed"] == 0.75


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A reference folder: two defenses on one threat model, and one on another."""
    store = Store(tmp_path / "shipped")
    add(store, "r1", kept(300), attack="standard", defense="none")
    add(store, "r2", kept(100), attack="standard", defense="jpeg")
    add(store, "r3", kept(100), attack="standard", defense="jpeg", comparability="other")
    monkeypatch.setattr(leaderboard, "REFERENCE", store.folder)
    return store


def test_shipped_rows_stand_beside_local_ones_that_they_compare_with(store, shipped):
    add(store, "a", kept(298), attack="standard", defense="none")
    table = fold(store)
    assert table[["defense", "origin", "rank", "run_ids"]].to_numpy().tolist() == [
        ["none", "reference", 1, "r1"],
        ["none", "local", 1, "a"],
        ["jpeg", "reference", 3, "r2"],
    ]


def test_without_local_rows_nothing_shipped_is_listed(store, shipped):
    assert fold(store).empty


def test_the_shipped_folder_lists_itself_once_and_as_what_it_is(shipped):
    table = fold(Store(shipped.folder / ".." / "shipped"))
    assert table["origin"].tolist() == ["reference"] * 3


def test_a_copy_of_shipped_records_is_local_and_listed_once(store, shipped):
    shutil.copytree(shipped.records, store.records)
    assert fold(store)["origin"].tolist() == ["local"] * 3


def test_nothing_that_is_shipped_is_ever_set_aside(store, shipped):
    add(store, "a", kept(298), attack="standard", defense="none")
    (shipped.records / "r1.json").write_text("half")
    with pytest.warns(UserWarning, match=r"r1.json is not counted: it is torn, or no record$"):
        assert set(fold(store)["run_ids"]) == {"a", "r2"}
    assert (shipped.records / "r1.json").read_text() == "half"


def test_the_shipped_folder_is_found():
    assert leaderboard.REFERENCE == REFERENCE

"""The worst case of several attacks on a random victim, where it is known."""

from dataclasses import replace

import numpy as np
import pytest
from test_leaderboard import examples, record

from robustbench_local.results import Store
from robustbench_local.results.summary import summarise
from robustbench_local.results.worst_case import worst_case


def mean_worst_case(store, records):
    return worst_case(store, [summarise(record) for record in records]).images.mean()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def judged(store, run_id, draws, *, randomized=True):
    """The record of an attack that left these draws right, bool (n, draws)."""
    draws = np.asarray(draws, bool)
    several = draws if draws.shape[1] > 1 else draws[:, :0]
    outcome = replace(examples(draws.mean(1)), clean_draws=several, robust_draws=several)
    known = {} if randomized is None else {"randomized": randomized}
    store.add({**record(run_id, outcome, judge_draws=draws.shape[1]), **known}, outcome)
    return store.find(run_id)


def test_attacks_that_break_disjoint_halves_break_everything(store):
    half = np.repeat([[True], [False]], 50, axis=0).repeat(10, axis=1)
    records = [judged(store, "a", half), judged(store, "b", ~half)]
    assert mean_worst_case(store, records[:1]) == 0.5
    assert mean_worst_case(store, records) == 0


@pytest.mark.parametrize("draws", [10, 7, 2])
def test_many_attacks_that_do_the_same_lower_nothing(store, draws):
    """The least of twenty shares of noise would be far below one half."""
    generator = np.random.default_rng(0)
    looks = [generator.random((500, draws)) < 0.5 for _ in range(20)]
    records = [judged(store, f"{place:02}", look) for place, look in enumerate(looks)]
    strongest = min(look.mean() for look in looks)
    assert mean_worst_case(store, records) == pytest.approx(0.5, abs=0.05)
    assert mean_worst_case(store, records) <= strongest + 1e-12


def test_each_image_is_scored_on_draws_that_did_not_choose_its_attack(store):
    """Of image 0 either half of the draws chooses the attack that is wrong in none of the other."""
    first = judged(store, "a", [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    second = judged(store, "b", [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert mean_worst_case(store, [first, second]) == pytest.approx(1 / 3)


def test_the_worst_case_is_never_above_the_strongest_attack(store):
    """Chance alone chooses the second attack on image 1, and would score 0.75."""
    first = judged(store, "a", [[1, 0, 1, 1], [0, 1, 1, 0]])
    second = judged(store, "b", [[1, 1, 1, 1], [0, 1, 0, 1]])
    assert mean_worst_case(store, [first]) == mean_worst_case(store, [first, second]) == 0.625


def test_a_random_victim_with_one_draw_is_no_deterministic_one(store):
    """The least of two coins would be a quarter."""
    first, second = [[1], [1], [0], [0]], [[1], [0], [1], [0]]
    random = [judged(store, "a", first), judged(store, "b", second)]
    assert mean_worst_case(store, random) == 0.5
    certain = [judged(store, f"{run}0", draws, randomized=False)
               for run, draws in (("a", first), ("b", second))]  # fmt: skip
    assert mean_worst_case(store, certain) == 0.25


def test_records_without_single_draws_have_the_mean_of_the_strongest_attack(store):
    half = np.repeat([[True], [False]], 50, axis=0).repeat(10, axis=1)
    new = judged(store, "a", half)
    outcome = examples((~half).mean(1))
    old = record("b", outcome, judge_draws=10)
    store.add(old, outcome)
    assert mean_worst_case(store, [new, old]) == mean_worst_case(store, [old]) == 0.5


def test_the_draws_are_those_of_what_decides_each_image(store):
    """The first breaks half of the images in every draw, the second the others all or none."""
    broken = np.arange(100) < 50
    coins = np.tile(np.arange(10) % 4 < 2, (100, 1))
    first = judged(store, "a", np.tile(~broken[:, None], (1, 10)))
    second = judged(store, "b", coins | broken[:, None])
    found = worst_case(store, [summarise(first), summarise(second)])
    assert np.array_equal(found.draws, coins & ~broken[:, None])
    assert found.images == pytest.approx(found.draws.mean(axis=1))
    alone = worst_case(store, [summarise(second)])
    assert np.array_equal(alone.draws, coins | broken[:, None])


def test_a_victim_that_is_not_random_has_no_draws(store):
    record = judged(store, "a", [[1], [0]], randomized=False)
    assert worst_case(store, [summarise(record)]).draws is None

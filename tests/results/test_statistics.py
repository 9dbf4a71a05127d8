"""Intervals and p-values against closed formulas, enumeration, other libraries and simulation."""

from itertools import product
from math import hypot, sqrt

import numpy as np
import pytest
from scipy.stats import binom, binomtest, ttest_1samp, ttest_rel
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from robustbench_local.results import wilson
from robustbench_local.results.statistics import (
    _sources,
    _squared_error,
    accuracy,
    clopper_pearson,
    holm,
    p_difference,
    paired,
    seed_summary,
)


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 10), (1, 10), (50, 100), (962, 1000), (10000, 10000)]
)
def test_wilson_is_the_formula(successes, n):
    z = 1.959963984540054
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert wilson(successes, n) == pytest.approx((share, centre - half, centre + half), abs=1e-12)


def test_of_whole_images_it_is_that_of_scipy_to_the_last_digit():
    generator = np.random.default_rng(0)
    for n in (1, 7, 12, 100, 200, 1000, 10_000):
        for k in {0, n, *generator.integers(0, n + 1, 40).tolist()}:
            limits = binomtest(k, n).proportion_ci(0.95, method="wilson")
            assert wilson(k, n) == (k / n, limits.low, limits.high)


def test_fractions_of_draws_are_not_rounded_to_images():
    found = wilson(49.6, 100)
    assert found == pytest.approx((0.496, *proportion_confint(49.6, 100, method="wilson")))
    assert wilson(49, 100).low < found.low < wilson(50, 100).low


def test_without_several_draws_the_interval_is_over_images():
    correct = np.array([1.0, 1, 0, 1])
    for count in (0, 1):
        draws = np.tile(correct[:, None] > 0, (1, count))
        assert accuracy(correct, draws) == wilson(3, 4)


def test_draws_that_all_images_share_widen_the_interval():
    """Of ten draws six turn all of 1,000 images at once: ten coins beside a thousand images."""
    draws = np.tile(np.arange(10) < 6, (1000, 1))
    value, low, high = accuracy(draws.mean(1), draws)
    half = 2.262157 * sqrt(10 / 9 * 0.6 * 0.4) / sqrt(10)  # Student, 9 degrees of freedom
    images = wilson(600, 1000)
    below, above = hypot(0.6 - images.low, half), hypot(images.high - 0.6, half)
    assert (value, low, high) == pytest.approx((0.6, 0.6 - below, 0.6 + above), abs=1e-6)
    assert high - low > 10 * (images.high - images.low)


def test_limits_are_fractions():
    draws = np.tile(np.arange(4) < 3, (50, 1))
    assert accuracy(draws.mean(1), draws) == (0.75, 0, 1)


def test_images_that_draw_alone_are_hardly_given_more():
    alone = np.random.default_rng(0).random((4000, 10)) < 0.5
    _, low, high = accuracy(alone.mean(1), alone)
    images = wilson(alone.mean(1).sum(), 4000)
    assert images.high - images.low < high - low < 1.15 * (images.high - images.low)


def test_intervals_hold_what_they_promise_where_a_batch_shares_its_draw():
    """Each draw moves the accuracy of 1,000 images by five points; the truth is 0.6.

    Images differ in how hard they are, so that both sources weigh the same: 95% of 600 repetitions
    are 570 with a standard deviation of 5, a few more for what Wilson holds of the draws already.
    The wider of the two intervals alone held 543.
    """
    generator, held = np.random.default_rng(0), 0
    for _ in range(600):
        shift = generator.normal(0.6, 0.05, 10)
        draws = generator.random((1000, 1)) < shift
        _, low, high = accuracy(draws.mean(1), draws)
        held += low <= 0.6 <= high
    assert 560 <= held <= 595


def test_draws_are_a_source_of_their_own_and_images_lose_their_part():
    """Closed forms: ten coins for all images; images that draw alone; too few draws; two sides."""
    coins = np.tile(np.arange(10) < 6, (1000, 1))
    one, none = coins.mean(axis=1)[None], np.zeros((1, 1000))
    images, draws = _sources(one, none, (coins, None))
    assert (images.over, images.variance) == ("images", 0.0)
    assert draws == ("draws", pytest.approx(10 / 9 * 0.24 / 10), 9)
    for few in (coins[:, :1], coins[:, :0], None):
        assert len(_sources(one, none, (few, None))) == 1
    generator = np.random.default_rng(2)
    alone = generator.random((500, 10)) < 0.5
    plain = _squared_error(alone.mean(axis=1))
    images, draws = _sources(alone.mean(axis=1)[None], np.zeros((1, 500)), (alone, None))
    # Nothing but draws of its own: over images nearly all of the variance is theirs.
    assert images.variance < 0.2 * plain and draws.variance == pytest.approx(plain, rel=0.8)
    same = _sources(one, one, (coins, coins))  # what draws do to both makes no difference
    assert [source.over for source in same] == ["images"]
    opposite = _sources(one, 1 - one, (coins, ~coins))
    assert opposite[1].variance == pytest.approx(4 * 10 / 9 * 0.24 / 10)


def test_of_several_seeds_draws_are_not_looked_at():
    generator = np.random.default_rng(12)
    draws = generator.random((300, 8)) < generator.normal(0.6, 0.1, 8)
    seeds = np.stack([draws.mean(axis=1)] * 2)
    other = generator.random((1, 300)) < 0.5
    assert p_difference(seeds, other, draws=(draws, None)) == p_difference(seeds, other)
    assert p_difference(seeds[:1], other, draws=(draws, None)) > p_difference(seeds[:1], other)


@pytest.mark.slow
@pytest.mark.parametrize("random", [1, 2])
@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.05])
def test_differences_hold_their_level_where_images_share_draws(spread, count, random):
    """Equal victims, one or both random, whose draws move all images: standard error 0.7%.

    With the images taken as independent 5 points of spread make a third of them significant, and
    more than half where both are random.
    """
    generator, held, significant, ignoring = np.random.default_rng(11), 0, 0, 0
    for repetition in range(1000):
        difficulty = generator.random(500)
        sides, draws = [], []
        for side in range(2):
            level = 0.6 + generator.normal(0, spread, count) * (side < random)
            noise = generator.random((500, count if side < random else 1))
            right = 0.7 * difficulty[:, None] + 0.3 * noise < level[: noise.shape[1]]
            sides.append(right.mean(axis=1))
            draws.append(right if side < random else None)
        result = paired(*sides, draws=draws, resamples=1000, seed=repetition)
        held += result.low <= 0 <= result.high
        significant += result.p_value < 0.05
        ignoring += p_difference(*sides) < 0.05
    assert held / 1000 >= 0.94
    assert significant / 1000 <= 0.06
    assert spread < 0.05 or ignoring / 1000 > (0.3 if random == 1 else 0.5)


@pytest.mark.parametrize("together", [1.0, -1.0])
def test_draws_that_both_sides_share_are_compared_draw_by_draw(together):
    """The judge gives two runs of a seed the same draws: they move both victims, or oppositely."""
    generator, significant, found = np.random.default_rng(13), 0, 0
    for _ in range(300):
        difficulty, moved = generator.random((500, 1)), generator.normal(0, 0.05, 10)
        for gap in (0.0, 0.04):
            levels = (0.6 + moved, 0.6 + gap + together * moved)
            draws = [
                0.7 * difficulty + 0.3 * generator.random((500, 10)) < level for level in levels
            ]
            p_value = p_difference(*(each.mean(axis=1) for each in draws), draws=tuple(draws))
            significant += gap == 0 and p_value < 0.05
            found += gap > 0 and p_value < 0.05
    assert significant / 300 <= 0.08
    assert together < 0 or found / 300 > 0.9


def test_binary_outcomes_with_draws_that_vary_are_no_coin_tosses():
    kept, lost = np.ones(50), np.zeros(50)
    draws = np.tile(np.arange(10) < 6, (50, 1))
    assert p_difference(kept, lost) < 1e-14
    assert paired(kept, lost).over == ("images",)
    result = paired(kept, lost, draws=(draws, None))
    assert result.method == "paired t" and result.over == ("images", "draws")
    assert result.p_value > 1e-6


def test_limits_agree_with_statsmodels():
    generator = np.random.default_rng(0)
    n = generator.integers(1, 3000, 300)
    successes = generator.integers(0, n + 1)
    for case in range(300):
        k, of = int(successes[case]), int(n[case])
        theirs = proportion_confint(k, of, method="wilson")
        _, low, high = wilson(k, of)
        assert (low, high) == pytest.approx(theirs, abs=1e-9)
        exact = clopper_pearson(k, of)
        assert exact == pytest.approx((k / of, *proportion_confint(k, of, method="beta")))
        assert exact.low <= low + 0.002 and exact.high >= high - 0.002
    assert wilson(0, 7).low == 0 and wilson(7, 7).high == 1


def test_mcnemar_agrees_with_statsmodels_on_random_tables():
    generator = np.random.default_rng(1)
    for _ in range(200):
        n = int(generator.integers(1, 400))
        first, second = generator.random((2, n)) < generator.random((2, 1))
        table = [[int((first & second).sum()), int((first & ~second).sum())],
                 [int((~first & second).sum()), int((~first & ~second).sum())]]  # fmt: skip
        expected = mcnemar(table, exact=True).pvalue
        assert p_difference(first[None], second[None]) == pytest.approx(expected, rel=1e-12)
        assert paired(first, second, resamples=10).p_value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", range(1, 11))
def test_mcnemar_is_the_share_of_all_coin_tosses(n):
    """Which of the two keeps each discordant image is tossed: every outcome is listed."""
    tosses = np.array(list(product((0, 1), repeat=n)))
    for first_only in range(n + 1):
        first = np.array([1.0] * first_only + [0.0] * (n - first_only) + [1, 0])
        second = np.array([0.0] * first_only + [1.0] * (n - first_only) + [1, 0])
        observed = abs(first_only - n / 2)
        share = (abs(tosses.sum(axis=1) - n / 2) >= observed).mean()
        assert p_difference(first[None], second[None]) == pytest.approx(share)


def test_of_one_seed_fractions_are_the_paired_t_test():
    first, second = np.random.default_rng(2).integers(0, 11, (2, 1, 300)) / 10
    assert p_difference(first, second) == pytest.approx(ttest_rel(first[0], second[0]).pvalue)


def test_where_seeds_alone_vary_it_is_a_t_test_over_seeds():
    """All images of a seed are kept as often: only three accuracies are independent."""
    accuracies = np.array([0.5, 0.6, 0.8])
    first = np.repeat(accuracies[:, None], 50, axis=1)
    expected = ttest_1samp(accuracies, 0.3).pvalue
    assert p_difference(first, np.full((1, 50), 0.3)) == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_inputs_and_no_variance_are_safe(seeds):
    generator = np.random.default_rng(3)
    same = generator.integers(0, 11, (seeds, 40)) / 10
    assert p_difference(same, same) == pytest.approx(1)
    for value in (0.0, 0.3, 1.0):
        constant = np.full((seeds, 40), value)
        assert p_difference(constant, constant) == 1
        result = paired(constant, constant)
        assert result.difference == 0 and result.low < 0 < result.high
    ones, tenths = np.ones((seeds, 40)), np.full((seeds, 40), 0.9)
    assert p_difference(ones, tenths) == pytest.approx(2.0**-39)  # all 40 images: the sign test
    assert p_difference([[1.0]], [[0.5]]) == 1
    assert p_difference([[1.0], [0.0]], [[0.5]]) == 1


def test_p_values_are_symmetric_and_need_the_same_images():
    generator = np.random.default_rng(4)
    first, second = (generator.random((3, 60)) < 0.7) * 1.0, (generator.random((2, 60)) < 0.5) * 1.0
    assert p_difference(first, second) == pytest.approx(p_difference(second, first))
    for refused in (second[:, 1:], np.zeros((1, 0)), np.zeros((1, 1, 60))):
        with pytest.raises(ValueError, match="expected"):
            p_difference(first, refused)


def test_paired_counts_and_is_the_same_again():
    first = np.array([1.0] * 70 + [0] * 30)
    second = np.array([1.0] * 40 + [0] * 50 + [1] * 10)
    result = paired(first[None], second[None])
    assert (result.only_first, result.only_second) == (30, 10)
    assert result.difference == pytest.approx(0.2) and result.images == 100
    assert result.seeds == (1, 1) and result.method == "exact McNemar"
    assert result == paired(first[None], second[None])
    assert 0 < result.low < 0.2 < result.high
    swapped = paired(second[None], first[None], seed=1)
    assert (-swapped.high, -swapped.low) == pytest.approx((result.low, result.high), abs=0.03)


def test_the_two_ways_to_resample_give_the_same_interval():
    """Many distinct values are drawn singly, few as counts; both beside the plain bootstrap."""
    generator = np.random.default_rng(5)
    few = generator.integers(0, 2, (1, 2000)) * 1.0
    many = np.clip(few + generator.normal(0, 1e-6, few.shape), 0, 1)
    other = generator.random((1, 2000))
    zero = np.zeros_like(few)
    assert paired(few, zero)[:3] == pytest.approx(paired(many, zero)[:3], abs=0.003)
    result, differences = paired(few, other), (few - other)[0]
    means = [differences[generator.integers(0, 2000, 2000)].mean() for _ in range(5000)]
    assert result[1:3] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.003)


def test_holm_is_that_of_statsmodels():
    p_values = np.random.default_rng(6).random(20) ** 4
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]).size == 0


def test_seed_summary():
    outcomes = np.zeros((3, 100))
    for seed, kept in enumerate((80, 90, 70)):
        outcomes[seed, :kept] = 1
    summary = seed_summary(outcomes)
    assert summary.mean == pytest.approx(0.8) and summary.worst == pytest.approx(0.7)
    assert summary.sd == pytest.approx(0.1)
    half = 4.302653 * 0.1 / sqrt(3)  # Student, 2 degrees of freedom
    over_images = wilson(80, 100)
    assert summary.low == pytest.approx(0.8 - np.hypot(0.8 - over_images.low, half), abs=1e-6)
    assert summary.high == 1
    one = seed_summary(outcomes[0])
    assert one.sd is None and (one.mean, one.low, one.high) == over_images
    alike = seed_summary(outcomes[[0, 0, 0]])
    assert (alike.mean, alike.low, alike.high) == pytest.approx(over_images)


# How often intervals hold the truth. Each simulation says its own standard error; the bar is 94%.


def test_clopper_pearson_covers_95_everywhere():
    """No simulation: every outcome of 40 images, weighed by its probability."""
    limits = np.array([clopper_pearson(k, 40)[1:] for k in range(41)])
    for truth in np.linspace(0, 1, 401):
        holds = (limits[:, 0] - 1e-12 <= truth) & (truth <= limits[:, 1] + 1e-12)
        assert binom.pmf(np.arange(41), 40, truth)[holds].sum() >= 0.95 - 1e-9


def test_wilson_covers():
    """40,000 accuracies, all as likely: standard error 0.11%."""
    generator = np.random.default_rng(7)
    for n in (50, 1000):
        truth = generator.random(40_000)
        limits = np.array([wilson(kept, n)[1:] for kept in range(n + 1)])
        low, high = limits[generator.binomial(n, truth)].T
        assert ((low <= truth) & (truth <= high)).mean() >= 0.945


@pytest.mark.parametrize(("first", "second"), [(0.002, 0.0), (0.05, 0.01), (0.5, 0.4), (0.9, 0.0)])
def test_paired_intervals_cover(first, second):
    """Shares that only one of the two keeps, down to 2 images of 1,000; standard error 0.5%."""
    generator, held = np.random.default_rng(8), 0
    for repetition in range(2000):
        u = generator.random(1000)
        result = paired(u < first, (first <= u) & (u < first + second), resamples=1000,
                        seed=repetition)  # fmt: skip
        held += result.low <= first - second <= result.high
    assert held / 2000 >= 0.94


def hardness(generator, images, seeds, spread):
    """Outcomes of seeds that share how hard an image is; each seed has a level of its own."""
    shared, own = generator.random(images), generator.random((seeds, images))
    return (0.7 * shared + 0.3 * own < 0.6 + generator.normal(0, spread, (seeds, 1))) * 1.0


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_means_over_seeds_cover(seeds, spread):
    """Training noise from none to well above that of images; standard error 0.5%."""
    generator = np.random.default_rng(9)
    truth = 0.450 / 0.7  # P(0.7 u + 0.3 v < 0.6) = (0.6 - 0.15) / 0.7, linear around it
    held = 0
    for _ in range(2000):
        summary = seed_summary(hardness(generator, 500, seeds, spread))
        held += summary.low <= truth <= summary.high
    assert held / 2000 >= 0.94


@pytest.mark.parametrize(("one", "two"), [(3, 1), (3, 3), (5, 2)])
def test_differences_over_seeds_cover_and_tests_hold_their_level(one, two):
    """Two trainings of the same kind, noise well above that of images; standard error 0.7%.

    A side of one seed has no noise here: what one seed cannot tell is not promised.
    """
    generator, held, significant = np.random.default_rng(10), 0, 0
    for repetition in range(1000):
        shared = generator.random(500)

        def side(seeds, shared=shared):
            spread = 0.05 if seeds > 1 else 0.0
            level = 0.6 + generator.normal(0, spread, (seeds, 1))
            return (0.7 * shared + 0.3 * generator.random((seeds, 500)) < level) * 1.0

        result = paired(side(one), side(two), resamples=1000, seed=repetition)
        held += result.low <= 0 <= result.high
        significant += result.p_value < 0.05
    assert held / 1000 >= 0.94
    assert significant / 1000 <= 0.06

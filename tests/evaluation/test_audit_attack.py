"""Attacking the victim again: planted defects are flagged and measured, sound rows are not."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import Counting, LinearVictim, Masked, NoisyLogits
from torch import nn

from robustbench_local.attacks import (
    APGD,
    FMN,
    PGD,
    Attack,
    Cascade,
    DeepFool,
    Noise,
    OnePixel,
    Spatial,
    Square,
    TorchAttacks,
    Transfer,
)
from robustbench_local.data import Split
from robustbench_local.defenses import Preprocess, Wrapped
from robustbench_local.evaluation import Audit, Judging, audit_attack, evaluate
from robustbench_local.evaluation.audit import COSTLY
from robustbench_local.evaluation.audit.case import Case
from robustbench_local.evaluation.audit.comparison import broken_besides
from robustbench_local.evaluation.audit.frozen import Frozen, frozen_randomness
from robustbench_local.evaluation.audit.rivals import noise_as_strong, weaker_than_black_box
from robustbench_local.evaluation.audit.trials import Trials
from robustbench_local.evaluation.audit.variations import black_box, longer
from robustbench_local.evaluation.audit.watch import Watch
from robustbench_local.evaluation.audit.watched import (
    last_drop,
    loss_still_falling,
    nearest_run,
    watched,
)
from robustbench_local.gradients import is_randomized
from robustbench_local.oracle import Oracle
from robustbench_local.randomness import reseed
from robustbench_local.threat import ThreatModel

LINF = ThreatModel(norm="linf", epsilon=0.1)
FULL = Audit(level="full", sample=50, black_box_queries=300, noise_draws=30)


@pytest.fixture(scope="module")
def split(digit_images):
    x, y = digit_images
    return Split((x * 255).round().to(torch.uint8), y, torch.arange(len(x)))


def audited(victim, attack, split, threat=LINF, *, config=FULL, draws=1, sources=None):
    """Every check by its name, all of them made or skipped with a reason."""
    randomized = draws > 1
    oracle = Oracle(victim, threat, 10, randomized=randomized)
    checks = audit_attack(
        oracle,
        attack,
        split,
        threat,
        config=config,
        judging=Judging(draws=draws, reseed=lambda seed: reseed(victim, seed)),
        batch_size=40,
        sources=sources,
    )
    assert tuple(check.name for check in checks) == COSTLY
    assert all(check.why and bool(check.measured) == (check.raised is not None) for check in checks)
    assert (oracle.forward_passes, oracle.backward_passes) == (0, 0)
    return {check.name: check for check in checks}


def raised(checks):
    return {name for name, check in checks.items() if check.raised}


def made(checks):
    return {name for name, check in checks.items() if check.raised is not None}


WHITE_BOX = set(COSTLY) - {"frozen_randomness"}


def test_pgd_on_an_undefended_network_is_sound(digit_model, split):
    checks = audited(digit_model, PGD(), split)
    assert made(checks) == WHITE_BOX
    assert raised(checks) == set()
    # What the evaluation says on the same images.
    some = Split(split.images[:50], split.labels[:50], split.indices[:50])
    outcomes = evaluate(Oracle(digit_model, LINF, 10), PGD(), some, batch_size=50)
    robust = outcomes.examples.robust_correct.mean()
    assert checks["not_converged"].measured["robust_accuracy"] == robust
    curve = checks["non_monotone_epsilon"].measured
    assert curve["epsilon"] == [0.05, 0.1, 0.2]
    assert curve["robust_accuracy"][1] == robust
    assert curve["robust_accuracy"] == sorted(curve["robust_accuracy"], reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        Square(queries=1000),
        DeepFool(),
        PGD(target="next"),
        Cascade(parts={"apgd": APGD(steps=20), "square": Square(queries=300)}),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_other_sound_attacks_are_not_flagged(digit_model, split, attack):
    assert raised(audited(digit_model, attack, split, config=replace(FULL, sample=30))) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=100, step_size=0.05, restarts=2),  # after 40 the loss falls by 5% in ten more
        APGD(),
        Cascade(
            parts={
                "apgd_ce": APGD(steps=50),
                "apgd_t": APGD(steps=20, loss="dlr_targeted"),
                "square": Square(queries=500),
            }
        ),
    ],
    ids=["pgd", "apgd", "cascade"],
)
def test_adversarial_training_under_strong_attacks_is_sound(robust_digit_model, split, attack):
    threat = replace(LINF, epsilon=0.3)
    checks = audited(robust_digit_model, attack, split, threat, config=replace(FULL, sample=40))
    assert raised(checks) == set()
    assert 0.5 < checks["not_converged"].measured["robust_accuracy"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "deviation"),
    [
        (PGD(step_size=0.05, eot_samples=4), 0.02),
        (APGD(steps=40, eot_samples=4), 0.02),
        (APGD(steps=40, eot_samples=4), 0.1),  # where PGD is not done after as many steps
    ],
    ids=["pgd", "apgd", "apgd and much noise"],
)
def test_harmless_noise_before_a_robust_network_is_sound(
    robust_digit_model, split, attack, deviation
):
    """Freezing gains the attack nothing, and nothing else breaks more either."""
    victim = Wrapped(Shaking(deviation), robust_digit_model)
    threat, config = replace(LINF, epsilon=0.3), replace(FULL, sample=40, black_box_queries=200)
    checks = audited(victim, attack, split, threat, draws=10, config=config)
    assert raised(checks) == set()
    check = checks["frozen_randomness"]
    assert check.measured["frozen"] > 0.5
    assert check.measured["broken_besides"] is not None


def test_a_masking_quantiser(digit_model, split):
    """Zero gradients: PGD keeps its random start, and everything else is better."""
    checks = audited(Masked(digit_model), PGD(), split, sources={"the bare network": digit_model})
    assert {"weaker_than_black_box", "unconstrained_failure"} <= raised(checks)
    besides = checks["weaker_than_black_box"].measured["broken_besides"]
    assert besides["Square (300 queries)"] > 20
    assert besides["transfer from the bare network"] > 20


def test_too_few_steps(digit_model, split):
    checks = audited(digit_model, PGD(steps=2), split)
    assert {"not_converged", "weaker_than_fgsm"} <= raised(checks)
    measured = checks["not_converged"].measured
    assert measured["longer"] < measured["robust_accuracy"] - 0.05
    assert "no more than 10 steps" in checks["loss_still_falling"].why


def test_steps_that_are_too_short(digit_model, split):
    checks = audited(digit_model, PGD(steps=15, step_size=0.02), split)
    assert {"not_converged", "loss_still_falling"} <= raised(checks)
    assert checks["loss_still_falling"].measured["mean_drop"] > 0.5


RESTARTED = {
    "pgd": PGD(steps=15, step_size=0.02, restarts=3),
    "apgd": APGD(steps=15, restarts=3),
    "apgd_t": APGD(steps=15, loss="dlr_targeted", targets=3),
}


@pytest.mark.parametrize("name", RESTARTED)
def test_restarts_do_not_hide_a_loss_that_still_falls(digit_model, split, name):
    """Beside the single run that the attack is made of: all of them fall as far in the end."""
    attack, config = RESTARTED[name], replace(FULL, sample=20)
    single = replace(attack, restarts=1, **({"targets": 1} if name == "apgd_t" else {}))

    def drop(attack):
        oracle = Oracle(digit_model, replace(LINF, epsilon=0.05), 10, randomized=False)
        trials = Trials(oracle, split, judging=Judging(), batch_size=20, sample=20)
        base = watched(trials, attack, paths=True)
        return loss_still_falling(trials, base, attack, config)

    many, one = drop(attack), drop(single)
    assert many.measured["resisting"] > 10
    assert many.measured["mean_drop"] == pytest.approx(one.measured["mean_drop"], rel=0.35)
    assert many.raised is one.raised
    assert many.raised is (name == "pgd")


def test_runs_that_cannot_be_told_apart_are_left_out(digit_model, split):
    class Restarted(Crashing):
        restarts = 2

    checks = audited(digit_model, Restarted(12), split, config=replace(FULL, sample=3))
    check = checks["loss_still_falling"]
    assert check.why == "where one of its restarts ends is not known; see not_converged"


@pytest.mark.slow
def test_a_random_victim_and_one_sample(digit_model, split):
    """More steps on single noisy gradients go on finding more; averaged ones do not."""
    victim = Wrapped(Shaking(0.3), digit_model)
    config = replace(FULL, sample=30, frozen_images=5)
    checks = audited(victim, PGD(steps=20, eot_samples=8), split, draws=10, config=config)
    assert made(checks) == WHITE_BOX - {"silent_success", "loss_still_falling"} | {
        "frozen_randomness"
    }
    assert raised(checks) == set()


@pytest.mark.parametrize("where", ["own", "torch", "numpy", "python"])
def test_a_frozen_victim_meets_an_image_with_one_draw_whatever_is_beside_it(digit_model, where):
    class Drawing(nn.Module):
        def forward(self, x):
            draws = {
                "torch": lambda: torch.rand(len(x)),
                "numpy": lambda: torch.from_numpy(np.random.rand(len(x))).float(),
                "python": lambda: torch.tensor([random.random() for _ in x]),
            }
            return digit_model(x) + draws[where]()[:, None] * torch.arange(10)

    victim = Wrapped(Shaking(0.3), digit_model) if where == "own" else Drawing()
    still = Frozen(victim, 5)
    assert is_randomized(still)
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    states = torch.get_rng_state(), random.getstate()
    once = still(x)
    assert torch.equal(still(x[[2, 0]]), once[[2, 0]])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not torch.equal(Frozen(victim, 6)(x), once)


class Shaking(Preprocess):
    """Noise on the pixels."""

    randomized = True
    differentiable = True

    def __init__(self, amplitude):
        super().__init__()
        self.amplitude = amplitude

    def transform(self, x):
        draw = torch.randn(x.shape, generator=self.generator(x.device))
        return (x + self.amplitude * draw).clamp(0, 1)


class SometimesMasked(Shaking):
    """Two times out of three the pixels are rounded, without a surrogate."""

    def __init__(self):
        super().__init__(0)

    def transform(self, x):
        draw = torch.rand(len(x), 1, 1, 1, generator=self.generator(x.device))
        return torch.where(draw < 0.67, (8 * x).round() / 8, x)


def test_an_attack_that_lives_on_the_randomness(digit_model, split):
    """Averaged gradients find the unmasked branch; frozen in the masked one there are none."""
    victim = Wrapped(SometimesMasked(), digit_model)
    config = replace(FULL, sample=20, frozen_images=10, epsilon_factors=[0.5])
    threat = replace(LINF, epsilon=0.2)
    attack = PGD(steps=15, step_size=0.2, eot_samples=8)
    check = audited(victim, attack, split, threat, draws=10, config=config)["frozen_randomness"]
    assert check.raised
    assert check.measured["fresh"] < 0.2
    assert check.measured["frozen"] > 0.4


def random_case(victim, attack, split, threat=LINF, *, draws=10, **settings):
    """What a single check of an attack on a random victim is given."""
    config = replace(FULL, **settings)
    oracle = Oracle(victim, threat, 10, randomized=True)
    judging = Judging(draws=draws, reseed=lambda seed: reseed(victim, seed))
    trials = Trials(oracle, split, judging=judging, batch_size=40, sample=config.sample)
    return Case(trials, oracle, attack, split, config, 0, {})


def test_gradients_that_are_masked_whether_or_not_the_draws_hold_still(digit_model, split):
    """Freezing changes nothing, and a search with scores tells it from a network that is robust."""
    masked = Wrapped(Shaking(0.02), Masked(digit_model))
    few = {"sample": 6, "frozen_images": 6, "black_box_queries": 60, "stray_images": 0}
    attack, threat = PGD(steps=5, eot_samples=2), replace(LINF, epsilon=0.25)
    check = frozen_randomness(random_case(masked, attack, split, threat, **few))
    assert min(check.measured["fresh"], check.measured["frozen"]) > 0.6
    assert check.measured["broken_besides"] >= 1
    assert check.raised
    assert "a search with scores alone breaks" in check.why

    sound = Wrapped(Shaking(0.02), digit_model)
    threat = replace(LINF, epsilon=0.02)
    check = frozen_randomness(random_case(sound, attack, split, threat, **few))
    assert check.measured["frozen"] > 0.6
    assert check.measured["broken_besides"] == 0
    assert check.raised is False


def test_freezing_compares_one_look_with_one_look(digit_model, split):
    """An attack that does nothing, on a victim that tosses a coin: right half the time.

    A look before the attack that had to go well too would make that a quarter for fresh draws.
    """

    class Tossing(nn.Module):
        def forward(self, x):
            heads = torch.rand(len(x), 1) < 0.5
            return torch.where(heads, digit_model(x), -digit_model(x))

    config = {"sample": 50, "frozen_images": 50, "black_box_queries": 2}
    right = replace(split, labels=digit_model(split.pixels(slice(None))).argmax(1))
    case = random_case(Tossing(), Forgetful(steps=1), right, **config)
    assert case.base.correct.double().mean() == pytest.approx(0.5, abs=0.08)
    check = frozen_randomness(case)
    assert check.measured["frozen"] == pytest.approx(check.measured["fresh"], abs=0.15)
    assert check.raised is False


def test_a_search_with_scores_tries_as_many_points_of_a_random_victim(digit_model, split):
    """A point costs the draws averaged, and under Square twice that."""
    x = split.pixels(slice(2))
    y = digit_model(x).argmax(1)
    for randomized, samples, cost in ((False, 1, 1), (True, 1, 2), (True, 5, 10)):
        victim = Counting(NoisyLogits(digit_model, 0.1 if randomized else 0))
        oracle = Oracle(victim, replace(LINF, epsilon=0.001), 10, randomized=randomized)
        search, queries = black_box(PGD(eot_samples=samples), oracle, 30)
        assert queries == 30 * cost
        search(oracle, x, y, oracle.threat)
        assert 29 * cost <= victim.images / 2 <= 30 * cost

    threat = ThreatModel(norm="l0", epsilon=1)
    search, queries = black_box(PGD(eot_samples=5), Oracle(digit_model, threat, 10), 30)
    assert (search.population * search.generations, queries) == (28, 150)
    tight = replace(threat, query_budget=50)
    search, queries = black_box(PGD(eot_samples=5), Oracle(digit_model, tight, 10), 30)
    assert (search.population * search.generations, queries) == (8, 50)


def test_masked_gradients_behind_noise_are_found_with_scores(digit_model, split):
    masked = Wrapped(Shaking(0.02), Masked(digit_model))
    attack, threat = PGD(steps=2, eot_samples=5), replace(LINF, epsilon=0.25)
    case = random_case(masked, attack, split, threat, sample=20, black_box_queries=60)
    check = weaker_than_black_box(case)
    assert check.raised
    assert list(check.measured["broken_besides"]) == ["Square (600 queries)"]


def test_a_single_draw_of_the_judge_makes_no_rival_stronger(split):
    """Every answer is a coin's: whoever compares single draws finds a quarter broken besides."""

    class Coin(nn.Module):
        def forward(self, x):
            return 0 * x.sum() + torch.randn(len(x), 10) + 2 * (torch.arange(10) == 0)

    zeros = replace(split, labels=torch.zeros_like(split.labels))
    config = {"sample": 400, "noise_draws": 1}
    case = random_case(Coin(), Forgetful(steps=1), zeros, draws=1, **config)
    share = float(case.base.correct.double().mean())
    assert 0.3 < share < 0.9
    check = noise_as_strong(case)
    assert not check.raised
    assert abs(check.measured["broken_besides"]) < 0.1 * 400


@dataclass(frozen=True, kw_only=True)
class Forgetful(PGD):
    """Searches as PGD does and returns the image it began with."""

    def run(self, model, x, y, threat):
        super().run(model, x, y, threat)
        return x.clone()


@dataclass(frozen=True, kw_only=True)
class Timid(PGD):
    """Does nothing above a radius of 0.1."""

    def run(self, model, x, y, threat):
        return x.clone() if threat.epsilon > 0.1 else super().run(model, x, y, threat)


@dataclass(frozen=True, kw_only=True)
class Lucky(PGD):
    """Breaks one image of a batch, and none above a radius of 0.1."""

    def run(self, model, x, y, threat):
        x_adv, found = super().run(model, x, y, threat), x.clone()
        if threat.epsilon <= 0.1:
            first = (model(x_adv).argmax(1) != y).nonzero()[:1, 0]
            found[first] = x_adv[first]
        return found


@dataclass(frozen=True, kw_only=True)
class Cheating(PGD):
    """Leaves the ball where it is asked for more than 0.1."""

    def run(self, model, x, y, threat):
        x_adv = super().run(model, x, y, threat)
        return x_adv if threat.epsilon <= 0.1 else 1 - x


@pytest.mark.slow
def test_an_attack_that_forgets_what_it_found(digit_model, split):
    checks = audited(digit_model, Forgetful(), split)
    right = checks["unconstrained_failure"].measured["attacked"]
    # Everything that PGD breaks, and nothing else, is lost.
    broken = round(50 * (1 - checks_of_pgd(digit_model, split))) - (50 - right)
    assert checks["silent_success"].measured["lost"] == broken > 10
    assert not checks["silent_success"].severe
    assert {"silent_success", "unconstrained_failure", "weaker_than_fgsm"} <= raised(checks)


def checks_of_pgd(model, split):
    return audited(model, PGD(), split)["not_converged"].measured["robust_accuracy"]


def test_an_attack_that_gets_weaker_with_epsilon(digit_model, split):
    check = audited(digit_model, Timid(), split)["non_monotone_epsilon"]
    assert check.raised
    assert "from epsilon 0.1 to 0.2 robust accuracy rises" in check.why
    assert "chance" not in check.why


def test_a_rise_that_raises_no_flag_says_why(digit_model, split):
    check = audited(digit_model, Lucky(), split)["non_monotone_epsilon"]
    assert check.raised is False
    assert "rises by" in check.why and check.why.endswith("no more than chance may do")


def test_a_foul_at_another_radius_is_told_and_ends_nothing(digit_model, split):
    checks = audited(digit_model, Cheating(), split)
    for name in ("non_monotone_epsilon", "unconstrained_failure"):
        assert checks[name].raised is None
        assert "exceeds epsilon" in checks[name].why
    assert checks["weaker_than_fgsm"].raised is False


class Crashing(Attack):
    """With a constructor of its own, and good for one radius only."""

    needs = "gradients"
    norms = frozenset({"linf"})

    def __init__(self, steps):
        super().__init__()
        object.__setattr__(self, "steps", steps)

    def run(self, model, x, y, threat):
        if threat.epsilon != 0.1:
            raise RuntimeError("tensors of different sizes")
        return PGD(steps=self.steps).run(model, x, y, threat)


def test_a_crash_at_another_radius_loses_nothing(digit_model, split):
    checks = audited(digit_model, Crashing(12), split)
    for name in ("non_monotone_epsilon", "unconstrained_failure"):
        assert checks[name].raised is None
        assert "RuntimeError tensors of different sizes" in checks[name].why
    assert checks["weaker_than_fgsm"].raised is False
    assert checks["silent_success"].raised is False


class Limited(nn.Module):
    """Has memory for so many images at a time."""

    def __init__(self, model, most):
        super().__init__()
        self.model, self.most = model, most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("no memory left")
        return self.model(x)


def test_the_sample_is_looked_at_in_batches(digit_model, split):
    config = replace(FULL, sample=20, noise_draws=2, black_box_queries=10)

    def measured(victim):
        checks = audit_attack(
            Oracle(victim, LINF, 10), PGD(steps=3), split, LINF, config=config,
            judging=Judging(), batch_size=5,
        )  # fmt: skip
        return [(check.name, check.raised, check.measured) for check in checks]

    assert measured(Limited(digit_model, 5)) == measured(digit_model)


def test_a_sample_that_cannot_be_looked_at_skips_every_check(digit_model, split):
    checks = audited(Limited(digit_model, 0), PGD(), split)
    why = "the sample could not be looked at: OutOfMemoryError no memory left"
    assert {(check.raised, check.why) for check in checks.values()} == {(None, why)}


class InBatches(nn.Module):
    """Noisy, and breaks down on an image that is alone."""

    def __init__(self, model):
        super().__init__()
        self.model = NoisyLogits(model, 0.01)

    def forward(self, x):
        return self.model(x).squeeze()[:, :]


def test_a_check_that_breaks_down_beside_the_attack_is_skipped(digit_model, split, monkeypatch):
    """Nothing of an evaluation that is done is lost, and the other checks are made."""
    config = replace(FULL, sample=6, noise_draws=2, black_box_queries=4, epsilon_factors=[0.5])
    attack = PGD(steps=2, eot_samples=2)
    checks = audited(InBatches(digit_model), attack, split, config=config, draws=2)
    assert checks["frozen_randomness"].raised is None
    assert checks["frozen_randomness"].why.startswith("the check could not be made: IndexError ")
    assert made(checks) >= {"not_converged", "weaker_than_fgsm", "noise_as_strong"}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trials, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audited(digit_model, attack, split, config=config)


def test_noise_breaks_what_an_idle_attack_does_not(digit_model, split):
    threat = replace(LINF, epsilon=0.5)
    checks = audited(digit_model, Forgetful(steps=1), split, threat)
    assert {"noise_as_strong", "weaker_than_fgsm", "weaker_than_black_box"} <= raised(checks)
    assert checks["noise_as_strong"].measured["draws"] == 30
    assert checks["silent_success"].raised


@pytest.mark.parametrize(
    ("attack", "threat", "left_out"),
    [
        (
            Square(queries=100),
            LINF,
            {"loss_still_falling", "weaker_than_fgsm", "weaker_than_black_box"},
        ),
        (
            Noise(),
            LINF,
            {"loss_still_falling", "weaker_than_fgsm", "weaker_than_black_box",
             "unconstrained_failure", "noise_as_strong"},
        ),
        (DeepFool(), LINF, {"loss_still_falling", "non_monotone_epsilon"}),
        (
            PGD(target=3),
            LINF,
            {"silent_success", "loss_still_falling", "weaker_than_fgsm", "weaker_than_black_box",
             "unconstrained_failure", "noise_as_strong"},
        ),
        (
            OnePixel(population=5, generations=2),
            ThreatModel(norm="l0", epsilon=1),
            {"loss_still_falling", "weaker_than_fgsm", "weaker_than_black_box",
             "unconstrained_failure"},
        ),
        (
            Spatial(),
            ThreatModel(norm="spatial", epsilon=0.3),
            {"silent_success", "loss_still_falling", "not_converged", "weaker_than_fgsm",
             "weaker_than_black_box", "unconstrained_failure"},
        ),
        (FMN(steps=5), ThreatModel(norm="l0", epsilon=3), {"loss_still_falling", "weaker_than_fgsm",
                                                  "non_monotone_epsilon"}),
        (PGD(), replace(LINF, epsilon=0), WHITE_BOX),
    ],
    ids=["square", "noise", "deepfool", "targeted", "one_pixel", "spatial", "fmn_l0", "epsilon_0"],
)  # fmt: skip
def test_what_does_not_apply_is_left_out(digit_model, split, attack, threat, left_out):
    config = replace(FULL, sample=3, noise_draws=2, black_box_queries=20)
    checks = audited(digit_model, attack, split, threat, config=config)
    assert made(checks) == WHITE_BOX - left_out


def test_a_transfer_attack_asks_nothing(digit_model, split):
    from robustbench_local.attacks.transfer import Source

    attack = Transfer().with_models([Source("seed:1", digit_model, "", "")])
    checks = audited(digit_model, attack, split)
    assert made(checks) == {"not_converged", "non_monotone_epsilon", "noise_as_strong"}
    assert not checks["noise_as_strong"].raised


def test_little_is_checked_where_little_is_asked(digit_model, split):
    cheap = audited(digit_model, PGD(), split, config=Audit())
    assert made(cheap) == set()
    assert {check.why for check in cheap.values()} == {"audit=full makes this check"}
    oracle = Oracle(digit_model, LINF, 10)
    judged = Judging(victim=Masked(digit_model))
    checks = audit_attack(oracle, PGD(), split, LINF, config=FULL, judging=judged, batch_size=40)
    assert {check.why for check in checks} == {"the attack does not face the defense"}


def test_a_query_budget_holds_for_the_checks_too(digit_model, split):
    threat = replace(LINF, query_budget=25)
    config = replace(FULL, sample=10)
    checks = audited(digit_model, PGD(steps=20), split, threat, config=config)
    assert "threat.query_budget=25" in checks["not_converged"].why
    rivals = checks["weaker_than_black_box"].measured["broken_besides"]
    assert list(rivals) == ["Square (25 queries)"]


class Suspecting(nn.Module):
    """Rejects an image where the largest logit leads the next one by less than 5."""

    abstains = True

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        second = logits.topk(2, dim=1).values[:, 1:]
        return torch.cat([logits, second + 5], 1)


@pytest.mark.slow
@pytest.mark.parametrize("attack", [PGD(), Square(queries=200)], ids=["pgd", "square"])
def test_what_a_victim_rejects_after_an_attack_is_not_broken(digit_model, split, attack):
    """As in the evaluation; and a search that ends in a rejection has lost nothing."""
    victim = Suspecting(digit_model)
    checks = audited(victim, attack, split)
    some = Split(split.images[:50], split.labels[:50], split.indices[:50])
    examples = evaluate(Oracle(victim, LINF, 10), attack, some, batch_size=40).examples
    robust = examples.robust_correct.mean()
    assert checks["not_converged"].measured["robust_accuracy"] == robust
    assert (examples.adversarial_rejected > 0).sum() > 10
    assert not checks["silent_success"].raised
    assert checks["unconstrained_failure"].raised is False


def test_nothing_is_right_so_nothing_is_attacked(digit_model, split):
    wrong = replace(split, labels=(digit_model(split.pixels(slice(None))).argmax(1) + 1) % 10)
    checks = audited(digit_model, PGD(), wrong)
    assert {check.why for check in checks.values()} == {"none of 50 images is classified correctly"}


def test_what_an_attack_reports_is_not_touched(digit_model, split):
    attack = Cascade(parts={"pgd": PGD(steps=5)})
    some = Split(split.images[:20], split.labels[:20], split.indices[:20])
    evaluate(Oracle(digit_model, LINF, 10), attack, some, batch_size=20)
    before = attack.report(LINF)
    audited(digit_model, attack, split, config=replace(FULL, sample=20))
    assert attack.report(LINF) == before


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (PGD(steps=7, restarts=3), {"steps": 21, "restarts": 3}),
        (Square(queries=50, restarts=2), {"queries": 150, "restarts": 2}),
        (OnePixel(population=5, generations=4), {"population": 5, "generations": 12}),
        (Noise(samples=4), {"samples": 12}),
        (TorchAttacks(name="PGD"), {"kwargs": {"steps": 30}}),
        (TorchAttacks(name="PGD", kwargs={"steps": 4}), {"kwargs": {"steps": 12}}),
        (TorchAttacks(name="FGSM"), None),
        (Spatial(), None),
    ],
    ids=["pgd", "square", "one_pixel", "noise", "default", "given", "fgsm", "spatial"],
)
def test_three_times_as_long(attack, expected):
    varied = longer(attack, 3)
    if expected is None:
        assert varied is None
    else:
        assert {name: getattr(varied, name) for name in expected} == expected
        assert replace(varied, **{name: getattr(attack, name) for name in expected}) == attack


def test_every_part_of_a_cascade_goes_on_for_longer():
    cascade = Cascade(parts={"first": PGD(steps=3), "second": Square(queries=10)}, eot_samples=2)
    varied = longer(cascade, 2)
    assert varied.parts == {"first": PGD(steps=6), "second": Square(queries=20)}
    assert varied.eot_samples == 2


class Replaying(Attack):
    """Asks about the points it was given, a call for each list, and returns the images."""

    needs = "scores"
    norms = frozenset({"linf", "l2", "l1", "l0"})

    def __init__(self, calls):
        super().__init__()
        object.__setattr__(self, "calls", calls)

    def run(self, model, x, y, threat):
        for call in self.calls:
            model(call)
        return x


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.1), ("l2", 0.3), ("l1", 1.0), ("l0", 4.0)])
def test_whose_point_it_is_is_found_by_the_ball_it_lies_in(norm, radius):
    """Shuffled, in parts, and beside points of nobody; beside a loop over all pairs."""
    generator = torch.Generator().manual_seed(0)
    threat = ThreatModel(norm=norm, epsilon=radius, access="scores")
    x = torch.rand(6, 3, 4, 4, generator=generator)
    victim = LinearVictim(torch.randn(3, 48, generator=generator), torch.zeros(3))
    y = torch.arange(6) % 3
    noise = torch.randn(40, 3, 4, 4, generator=generator)
    if norm == "l0":
        noise *= torch.rand(40, 1, 4, 4, generator=generator) < 0.25
    origin = torch.randint(0, 6, (40,), generator=generator)
    if norm != "l0":  # from nothing to twice the radius
        share = 2 * torch.rand(40, 1, 1, 1, generator=generator)
        noise *= share * radius / threat.size(noise, 0 * noise).view(-1, 1, 1, 1)
    points = x[origin] + noise
    points = points.float().clamp(0, 1)
    inside = threat.size(points, x[origin]) <= radius
    assert 5 < int(inside.sum()) < 35

    watch = Watch.of(Oracle(victim, threat, 3), x, y, strays=False, paths=True)
    Replaying([points[:5], points[5:6], points[6:]])(watch, x, y, threat)

    logits = victim(points).detach()
    margins = torch.stack(
        [row.index_fill(0, y[i], -torch.inf).max() - row[y[i]]
         for row, i in zip(logits, origin, strict=True)]
    )  # fmt: skip
    for image in range(6):
        mine = inside & (origin == image)
        assert watch.path(image).tolist() == pytest.approx(margins[mine].tolist())
        if mine.any():
            assert float(watch.worst[image]) == pytest.approx(float(margins[mine].max()))
            if margins[mine].max() > 0:
                best = margins.masked_fill(~mine, -torch.inf).argmax()
                assert torch.equal(watch.points[image], points[best])
        else:
            assert watch.worst[image] == -torch.inf
            assert torch.equal(watch.points[image], x[image])


def test_points_that_might_be_somebody_elses_do_not_count():
    """Two images in each other's ball: the order tells whose a point is, and owners do."""
    threat = ThreatModel(norm="linf", epsilon=0.3, access="scores")
    x = torch.cat([torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.6)])
    victim = LinearVictim(torch.tensor([[0.0] * 4, [1.0] * 4]), torch.tensor([2.2, 0.0]))
    y = torch.tensor([0, 1])
    x_adv = torch.stack([x[1], x[0]])

    def watch(strays=False):
        return Watch.of(Oracle(victim, threat, 2), x, y, strays=strays, paths=False)

    in_order, alone, owned, elsewhere = (watch() for _ in range(4))
    straying = watch(strays=True)
    in_order(x_adv)
    assert (in_order.worst > 0).all()
    assert torch.equal(in_order.points, x_adv)
    alone(x_adv[:1])
    assert (alone.worst == -torch.inf).all()
    owned(x_adv[:1], torch.tensor([0]))
    assert (owned.worst > 0).tolist() == [True, False]
    far = torch.full((1, 1, 2, 2), 0.85)  # in the ball of the second alone
    elsewhere(far)
    assert (elsewhere.worst > -torch.inf).tolist() == [False, True]
    straying(far)
    assert (straying.worst == -torch.inf).all()


def test_the_last_steps_of_a_loss():
    rising = torch.linspace(-3, 1, 41)
    assert last_drop(rising, 10) == pytest.approx(0.25)
    done = torch.cat([rising[:31], torch.full((10,), -1.0)])
    assert last_drop(done, 10) == 0
    assert last_drop(torch.ones(30), 10) == 0
    # What was reached before and lost again does not count twice.
    wave = torch.cat([torch.tensor([-1.0, 1.0]), -torch.ones(20), torch.tensor([1.0])])
    assert last_drop(wave, 10) == 0


def test_the_run_that_came_nearest():
    runs = torch.tensor([[-5.0, -4.0, -3.0], [-9.0, -1.0, -2.0], [-8.0, -7.0, -6.0]])
    path = torch.cat([torch.tensor([0.0]), runs.flatten()])  # a look before the first run
    assert nearest_run(path, 3).tolist() == [-9, -1, -2]
    assert torch.equal(nearest_run(path, None), path)
    assert torch.equal(nearest_run(path[:2], 3), path[:2])


def test_luck_does_not_make_an_attack_weaker():
    """Two equally strong attacks on noisy images: neither breaks anything besides, on average."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(2000, 1, generator=generator)
    base, other = (torch.rand(2000, 10, generator=generator) < chance for _ in range(2))
    apart = broken_besides(base, other)
    assert abs(float(apart.mean())) < 2 * float(apart.std()) / 2000**0.5
    # Whoever looks at all draws at once is fooled.
    naive = (base.double().mean(1) - other.double().mean(1)).clamp(min=0)
    assert float(naive.mean()) > 0.03
    # What is really stronger shows: here by nearly all that the first attack had left.
    unbeaten = float(broken_besides(base, torch.zeros_like(base)).mean())
    assert unbeaten == pytest.approx(float(chance.mean()), abs=0.04)


def test_deterministic_images_count_one_by_one():
    base = torch.tensor([[True], [True], [False], [False]])
    other = torch.tensor([[True], [False], [True], [False]])
    assert broken_besides(base, other).tolist() == [0, 1, 0, 0]


def test_the_sample_may_be_larger_than_the_test_set(digit_model, split):
    few = Split(split.images[:7], split.labels[:7], split.indices[:7])
    checks = audited(digit_model, PGD(steps=12), few)
    assert checks["not_converged"].measured["n"] == 7


@pytest.mark.slow
def test_the_batch_size_changes_nothing(digit_model, split):

    def measured(batch_size):
        oracle = Oracle(digit_model, LINF, 10)
        checks = audit_attack(
            oracle, PGD(steps=3), split, LINF, config=FULL, judging=Judging(), batch_size=batch_size
        )
        return [(check.name, check.raised, check.measured) for check in checks]

    assert measured(50) == measured(13)

"""The certificate against closed forms: a linear classifier under normal noise is known exactly."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import LinearVictim, accuracy, digit_cnn, train
from scipy import optimize, stats
from torch import nn

from robustbench_local.attacks import PGD
from robustbench_local.data import Split
from robustbench_local.defenses import Defense, Preprocess, RandomizedSmoothing, Standard
from robustbench_local.defenses.certificate import (
    ABSTAIN,
    Certificate,
    Majority,
    certified_accuracy,
    lower_bound,
)
from robustbench_local.defenses.defense import declared_samples
from robustbench_local.errors import UserError
from robustbench_local.gradients import is_randomized
from robustbench_local.randomness import derive_seed, reseed
from robustbench_local.threat import ThreatModel

SIGMA = 0.3


class Linear:
    """Two classes, a plane between them, and images on both sides of it.

    `distance` is signed and in l2, `y` the side; the smoothed classifier has the same plane.
    """

    def __init__(self, count: int = 60, *, nearest: float = 0.05, farthest: float = 0.6) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(12, generator=generator, dtype=torch.float64)
        normal /= normal.norm()
        self.distance = torch.linspace(nearest, farthest, count, dtype=torch.float64)
        self.distance[::2] *= -1
        along = torch.randn(count, 12, generator=generator, dtype=torch.float64) * 0.1
        along -= (along @ normal)[:, None] * normal
        x = 0.5 + along + self.distance[:, None] * normal
        self.x = x.view(count, 3, 2, 2)
        self.y = (self.distance > 0).long()
        weight = 3.7 * torch.stack((-normal, normal))
        self.model = LinearVictim(weight, -weight.sum(1) * 0.5)

    def majority(self, **settings) -> Majority:
        part = RandomizedSmoothing(sigma=SIGMA, **settings)
        return part.majority(part(self.model))


@pytest.fixture(scope="module")
def linear() -> Linear:
    return Linear()


def test_the_bound_is_that_of_clopper_and_pearson():
    for successes, n, alpha in ((1, 10, 0.05), (73, 100, 0.001), (9990, 10_000, 0.001)):
        found = lower_bound(successes, n, alpha)
        interval = stats.binomtest(successes, n).proportion_ci(1 - 2 * alpha, method="exact")
        assert found == pytest.approx(interval.low, abs=1e-12)

        # Its definition: at that probability so many successes or more have probability alpha.
        def excess(p, successes=successes, n=n, alpha=alpha):
            return stats.binom.sf(successes - 1, n, p) - alpha

        assert found == pytest.approx(optimize.brentq(excess, 1e-9, 1 - 1e-9), abs=1e-9)
    assert lower_bound(0, 10, 0.05) == 0
    assert lower_bound(100, 100, 0.001) == pytest.approx(0.001 ** (1 / 100))


def test_the_radius_of_a_linear_model_is_the_closed_form_and_its_votes_binomial(linear):
    """The radius is sigma * quantile(bound(k)), and k is binomial with the exact probability."""
    n, alpha = 1000, 0.001
    found = linear.majority(n=n, alpha=alpha).certify(linear.x)
    exact = linear.distance.abs().numpy()
    probability = stats.norm.cdf(exact / SIGMA)  # of the right side, under the noise
    assert np.allclose(SIGMA * stats.norm.ppf(probability), exact)  # the closed form
    bounds = np.array([lower_bound(votes, n, alpha) for votes in range(n + 1)])
    places = []
    draws = np.random.default_rng(0)
    for certificate, side, share in zip(found, linear.y.tolist(), probability, strict=True):
        if certificate.prediction == ABSTAIN:
            assert certificate.radius == 0
            votes = int(np.flatnonzero(bounds < 0.5)[-1])
            places.append(draws.random() * stats.binom.cdf(votes, n, share))
            continue
        assert certificate.prediction == side
        votes = int(np.abs(bounds - stats.norm.cdf(certificate.radius / SIGMA)).argmin())
        assert certificate.radius == pytest.approx(SIGMA * stats.norm.ppf(bounds[votes]), abs=1e-9)
        below, here = stats.binom.cdf(votes - 1, n, share), stats.binom.pmf(votes, n, share)
        places.append(below + draws.random() * here)
    assert stats.kstest(places, "uniform").pvalue > 0.01
    radii = np.array([certificate.radius for certificate in found])
    assert (radii <= exact).all()


def test_many_votes_come_as_near_to_the_closed_form_as_the_bound_allows(linear):
    n, alpha = 50_000, 0.001
    for place in (10, 30, 50):
        exact = float(linear.distance[place].abs())
        share = stats.norm.cdf(exact / SIGMA)
        least, most = (
            SIGMA * stats.norm.ppf(lower_bound(int(stats.binom.ppf(q, n, share)), n, alpha))
            for q in (1e-4, 1 - 1e-4)
        )
        (found,) = linear.majority(n=n, alpha=alpha).certify(linear.x[place : place + 1])
        assert least <= found.radius <= min(most, exact)
        assert found.radius == pytest.approx(exact, abs=0.012)


def test_a_certificate_is_wrong_as_rarely_as_it_says():
    """Many certificates of one image: how many exceed the exact radius is binomial."""
    linear, n, alpha, repeats = Linear(2, nearest=0.2, farthest=0.2), 200, 0.1, 1500
    found = linear.majority(n0=10, n=n, alpha=alpha).certify(linear.x[1:].expand(repeats, 3, 2, 2))
    share = stats.norm.cdf(0.2 / SIGMA)
    too_many = next(k for k in range(n + 1) if lower_bound(k, n, alpha) > share)
    wrong = sum(certificate.radius > 0.2 for certificate in found)
    expected = stats.binom.sf(too_many - 1, n, share)
    assert 0.05 < expected <= alpha
    assert stats.binomtest(wrong, repeats, expected).pvalue > 0.01


def test_prediction_abstains_as_often_as_its_test_does():
    linear, n, alpha, repeats = Linear(2, nearest=0.05, farthest=0.05), 100, 0.05, 1500
    predicted = linear.majority(n=n, alpha=alpha).predict(linear.x[1:].expand(repeats, 3, 2, 2))
    share = stats.norm.cdf(0.05 / SIGMA)
    votes = np.arange(n + 1)
    decided = np.array([stats.binomtest(int(k), n).pvalue <= alpha for k in votes])
    mass = stats.binom.pmf(votes, n, share)
    right = mass[decided & (votes > n / 2)].sum()
    wrong = mass[decided & (votes < n / 2)].sum()
    assert 0.2 < right < 0.8
    counts = {label: int((predicted == label).sum()) for label in (1, 0, ABSTAIN)}
    assert stats.binomtest(counts[1], repeats, right).pvalue > 0.01
    assert stats.binomtest(counts[0], repeats, wrong).pvalue > 0.001
    assert counts[ABSTAIN] == repeats - counts[0] - counts[1]


def test_on_the_plane_itself_nothing_is_certified():
    linear = Linear(2, nearest=0, farthest=0)
    majority = linear.majority(n=200)
    images = linear.x[:1].expand(300, 3, 2, 2)
    assert sum(each != Certificate(ABSTAIN, 0.0) for each in majority.certify(images)) <= 3
    assert int((majority.predict(images) != ABSTAIN).sum()) <= 3


def test_the_noise_is_normal_and_not_clipped():
    class Pixels(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    x = torch.full((50, 1, 20, 20), 0.9, dtype=torch.float64)
    drawn = RandomizedSmoothing(sigma=0.5).through(Pixels())(x) - 0.9
    assert stats.kstest(drawn.flatten().numpy(), stats.norm(0, 0.5).cdf).pvalue > 0.01
    correlation = np.corrcoef(drawn[:-1].flatten(), drawn[1:].flatten())[0, 1]
    assert abs(correlation) < 4 / drawn.numel() ** 0.5


def split_of(linear: Linear) -> Split:
    """As 8-bit images, which moves them a little."""
    images = (linear.x * 255).round().to(torch.uint8)
    return Split(images, linear.y, 7 + torch.arange(len(images)))


def test_certified_accuracy_counts_right_and_far_enough(linear):
    split, radii = split_of(linear), (0.0, 0.2, 0.4, 5.0)
    part = RandomizedSmoothing(sigma=SIGMA, n=500, radii=[5, 0.4, 0.2, 0], images=None)
    victim, done = part(linear.model), []
    found = part.certify(victim, split, seed=3, progress=lambda n, share: done.append((n, share)))
    exact = (linear.model(split.pixels(slice(None))) @ torch.tensor([-1.0, 1.0])).abs() / 7.4
    values = [found["radii"][f"{radius:g}"]["value"] for radius in radii]
    for radius, value in zip(radii, values, strict=True):
        assert value <= float((exact > radius).double().mean())
        assert value >= float((exact > radius + 0.08).double().mean())
    assert values == sorted(values, reverse=True) and values[-1] == 0
    for place in found["radii"].values():
        right = round(place["value"] * 60)
        low = stats.beta.ppf(0.025, right, 60 - right + 1) if right else 0
        assert place["low"] == pytest.approx(low) and place["n"] == 60
        assert place["low"] <= place["value"] <= place["high"]
    settings = {"norm": "l2", "sigma": SIGMA, "n0": 100, "n": 500, "alpha": 0.001, "images": 60}
    assert found.items() >= settings.items()
    assert found["abstained"] + round(60 * values[0]) == 60  # a linear model errs on neither side
    assert found["largest_radius"] == pytest.approx(SIGMA * stats.norm.ppf(0.001 ** (1 / 500)))
    assert len(done) == 60 and done[-1] == (1, values[0])
    json.dumps(found, allow_nan=False)


def test_wrong_labels_count_as_wrong(linear):
    split = split_of(linear)
    majority = linear.majority(n=200)
    flipped = Split(split.images, 1 - split.labels, split.indices)
    assert certified_accuracy(majority, flipped, (0.0,))["radii"]["0"]["value"] == 0


def test_what_is_predicted_stands_beside_what_is_certified(linear):
    """From the same votes, so `predict` says it too with the draws of the same image."""
    split, part = split_of(linear), RandomizedSmoothing(sigma=SIGMA, n=40, images=None)
    found = part.certify(part(linear.model), split, seed=3)
    told, majority = found["predicted"], part.majority(part(linear.model))
    answers = []
    for place in range(len(split)):
        reseed(majority.noisy, derive_seed(3, "certify", int(split.indices[place])))
        majority.votes(split.pixels(slice(place, place + 1))[0], majority.n0)
        answers.append(majority.predict(split.pixels(slice(place, place + 1))))
    predicted = torch.cat(answers)
    assert told["value"] == (predicted == split.labels).double().mean() and told["n"] == 60
    assert told["low"] < told["value"] <= told["high"]
    assert told["abstained"] == int((predicted == ABSTAIN).sum()) > 0


def test_an_image_gets_the_same_certificate_whatever_else_is_certified(linear):
    split, majority = split_of(linear), linear.majority(n=50)
    singles = [
        certified_accuracy(
            majority,
            Split(*(part[place : place + 1] for part in vars(split).values())),
            (0.2,),
            seed=5,
        )["radii"]["0.2"]["value"]
        for place in range(60)
    ]
    together = certified_accuracy(majority, split, (0.2,), seed=5)
    assert together["radii"]["0.2"]["value"] == pytest.approx(np.mean(singles))
    assert certified_accuracy(majority, split, (0.2,), seed=5) == together
    spread = certified_accuracy(majority, split, (0.2,), images=7, seed=5)
    chosen = [place * 60 // 7 for place in range(7)]
    assert spread["radii"]["0.2"]["value"] == pytest.approx(np.mean([singles[i] for i in chosen]))
    assert spread["images"] == 7
    assert certified_accuracy(majority, split, (0.2,), images=999)["images"] == 60


def test_certifying_leaves_nothing_changed():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    network.train()
    part = RandomizedSmoothing(n=50, images=2)
    victim, before = part(network), copy.deepcopy(network.state_dict())
    split = Split(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4).long(),
                  torch.arange(4))  # fmt: skip
    state = torch.get_rng_state()
    part.certify(victim, split)
    assert all(part.training for part in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(weight.requires_grad for weight in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_victim_averages_and_training_sees_one_draw():
    class Counting(nn.Module):
        images = 0

        def forward(self, x):
            self.images += len(x)
            return x.flatten(1)

    model, x = Counting(), torch.rand(5, 1, 2, 2)
    defense = Defense(wrap={"randomized_smoothing": RandomizedSmoothing(draws=8)})
    victim = defense.apply(model)
    reseed(victim, 1)
    first = victim(x)
    assert model.images == 40 and not torch.equal(victim(x), first)
    reseed(victim, 1)
    assert torch.equal(victim(x), first)
    assert torch.allclose(first.exp().sum(1), torch.ones(5), atol=1e-5)
    model.images = 0
    defense.through(model).eval()(x)
    assert model.images == 5
    assert is_randomized(victim) and declared_samples(victim) == 3


class Dim(Preprocess):
    def transform(self, x):
        return x / 2


def test_only_the_first_wrap_certifies(linear):
    smoothing = RandomizedSmoothing(n=100, images=3)
    split = split_of(linear)
    with pytest.raises(UserError, match=r"dim changes.*type defense=\[randomized_smoothing,dim\]"):
        Defense(wrap={"dim": Dim(), "randomized_smoothing": smoothing})
    # Behind the noise anything may follow; in training anything may come before.
    first = Defense(wrap={"randomized_smoothing": smoothing, "dim": Dim()})
    assert first.certify(first.apply(linear.model), split)["images"] == 3
    absent = Dim(in_training=True, at_run_time=False)
    trained = Defense(wrap={"dim": absent, "randomized_smoothing": smoothing})
    assert trained.certify(trained.apply(linear.model), split)["images"] == 3
    for other in (Defense({"standard": Standard()}), Defense(wrap={"dim": Dim()})):
        assert other.certify(other.apply(linear.model), split) is None
    off = Defense(wrap={"randomized_smoothing": RandomizedSmoothing(at_run_time=False)})
    assert off.certify(off.apply(linear.model), split) is None
    with pytest.raises(UserError, match=r"a LinearVictim cannot be certified"):
        smoothing.certify(linear.model, split)


@pytest.mark.slow
def test_no_attack_gets_below_what_is_certified(digits, digit_images):
    """Digits: certified images hold under l2 PGD at the same radius, and so does the accuracy."""
    part = RandomizedSmoothing(sigma=0.25, draws=20, n=1000, alpha=0.001)
    network = digit_cnn()
    train(part.through(network), digits.train.pixels(slice(None)), digits.train.labels, epochs=6)
    victim = part(network)
    majority = part.majority(victim)
    x, y = digit_images[0][:50], digit_images[1][:50]
    found = majority.certify(x)
    right = torch.tensor([each.prediction for each in found]) == y
    reach = torch.tensor([each.radius for each in found])
    plain = majority.predict(x)
    assert float((plain == y).double().mean()) > 0.9
    # The soft classifier that is attacked says what the majority says.
    assert float((victim(x).argmax(1) == plain).double().mean()) > 0.95
    for epsilon, least in ((0.25, 0.7), (0.5, 0.4)):
        certified = right & (reach > epsilon)
        assert float(certified.double().mean()) > least
        attack = PGD(steps=20, step_size=0.2, eot_samples=declared_samples(victim))
        x_adv = attack(victim, x, y, ThreatModel(norm="l2", epsilon=epsilon))
        held = majority.predict(x_adv) == y
        assert bool(held[certified].all())
        assert float(certified.double().mean()) <= accuracy(victim, x_adv, y)
    # The attack is no weak one: a larger budget breaks what a smaller one provably cannot.
    x_adv = attack(victim, x, y, ThreatModel(norm="l2", epsilon=3.0))
    assert accuracy(victim, x_adv, y) < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0}, r"randomized_smoothing\.sigma=0; expected a standard deviation above 0"),
        ({"sigma": -1}, r"randomized_smoothing\.sigma=-1;"),
        ({"alpha": 0}, r"alpha=0; expected the probability of a wrong certificate.*type"),
        ({"alpha": 0.5}, r"alpha=0\.5;"),
        ({"alpha": 1.7}, r"alpha=1\.7;"),
        ({"n0": 0}, r"n0=0; expected a whole number"),
        ({"n": 0.5}, r"\.n=0\.5;"),
        ({"draws": 0}, r"draws=0;"),
        ({"images": 0}, r"images=0;"),
        ({"eot_samples": -2}, r"eot_samples=-2;"),
        ({"radii": []}, r"radii=\[\]; expected a list of radii.*type"),
        ({"radii": 0.5}, r"radii=0\.5; expected a list"),
        ({"radii": [0.25, -1]}, r"radii entry=-1; expected an l2 radius"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        RandomizedSmoothing(**settings)

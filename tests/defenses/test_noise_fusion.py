"""Noise on the pixels, and the mean over several draws."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LinearVictim
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy import stats
from torch import nn

from robustbench_local.attacks import PGD
from robustbench_local.building import build
from robustbench_local.defenses import Defense, NoiseFusion, Standard, averaged
from robustbench_local.defenses.averaged import Averaged
from robustbench_local.defenses.defense import declared_samples
from robustbench_local.errors import UserError
from robustbench_local.gradients import input_gradient, is_randomized
from robustbench_local.networks import describe_part
from robustbench_local.randomness import reseed
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, fit

CONF = Path(__file__).parents[2] / "conf"
GREY = torch.full((40, 1, 20, 25), 0.5, dtype=torch.float64)

UNITS = {
    "uniform": stats.uniform(-1, 2),
    "gaussian": stats.norm(),
    "laplace": stats.laplace(scale=0.5**0.5),
}


class Pixels(nn.Module):
    """Answers with what it is given, flattened, and counts its images."""

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, x):
        self.images += len(x)
        return x.flatten(1)


class Table(nn.Module):
    """Answers with the next rows of a table, whatever it is asked."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        start = sum(self.calls) - len(x)
        return self.rows[start : start + len(x)]


def noisy(x, **settings):
    return NoiseFusion(**settings).through(Pixels())(x).view_as(x)


@pytest.mark.parametrize("distribution", UNITS)
def test_each_distribution_is_what_it_is_called(distribution):
    drawn = (noisy(GREY, distribution=distribution, amplitude=0.02) - 0.5) / 0.02
    assert stats.kstest(drawn.flatten().numpy(), UNITS[distribution].cdf).pvalue > 0.01
    assert drawn.var().item() == pytest.approx(UNITS[distribution].var(), rel=0.05)


def test_bernoulli_is_plus_or_minus_one():
    drawn = (noisy(GREY, distribution="bernoulli", amplitude=0.25) - 0.5) / 0.25
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}
    assert stats.binomtest(int((drawn > 0).sum()), drawn.numel()).pvalue > 0.01


@pytest.mark.parametrize("distribution", [*UNITS, "bernoulli"])
def test_draws_are_fresh_for_every_pixel_image_and_pass(distribution):
    model = NoiseFusion(distribution=distribution, amplitude=0.02).through(Pixels())
    first, second = (model(GREY).view_as(GREY) - 0.5 for _ in range(2))
    pairs = {
        "passes": (first, second),
        "images": (first[:-1], first[1:]),
        "pixels": (first[..., :-1], first[..., 1:]),
    }
    for left, right in pairs.values():
        correlation = np.corrcoef(left.flatten(), right.flatten())[0, 1]
        assert abs(correlation) < 4 / left.numel() ** 0.5


def test_what_leaves_the_box_is_clipped():
    x = torch.full_like(GREY, 0.1)
    out = noisy(x, amplitude=0.2)
    assert out.min() == 0 and out.max() <= 1
    black = int((out == 0).sum())
    assert stats.binomtest(black, out.numel(), stats.norm.cdf(-0.5)).pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (2, 3, 9, 4), (1, 1, 1, 1)])
@pytest.mark.parametrize("distribution", [*UNITS, "bernoulli"])
def test_shape_and_type_are_kept(shape, dtype, distribution):
    x = torch.rand(shape).to(dtype)
    before = x.clone()
    out = noisy(x, distribution=distribution)
    assert out.dtype == dtype and out.shape == shape and not torch.equal(out, x)
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(x, before)


def test_draws_come_from_the_own_generator():
    victim, x = NoiseFusion()(Pixels()), torch.rand(4, 1, 3, 3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    reseed(victim, 1)
    first, second = victim(x), victim(x)
    assert not torch.equal(first, second)
    reseed(victim, 1)
    other = copy.deepcopy(victim)
    assert torch.equal(victim(x), first) and torch.equal(victim(x), second)
    assert torch.equal(other(x), first)
    reseed(victim, 2)
    assert not torch.equal(victim(x), first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize("draws", [1, 2, 7])
@pytest.mark.parametrize("at_once", [1, 12, 10**6])
def test_the_answer_is_the_logarithm_of_the_mean_probability(draws, at_once, monkeypatch):
    monkeypatch.setattr(averaged, "images_at_once", lambda x: at_once)
    logits = 30 * torch.randn(draws * 4, 3, generator=torch.Generator().manual_seed(0))
    table = Table(logits)
    answer = Averaged(table, draws=draws)(torch.rand(4, 1, 2, 2))
    wide = np.exp(logits.double().numpy())
    mean = (wide / wide.sum(1, keepdims=True)).reshape(draws, 4, 3).mean(0)
    assert np.allclose(answer.numpy(), np.log(mean), atol=1e-4)
    assert max(table.calls) <= max(4, at_once) and sum(table.calls) == draws * 4


def test_averaging_divides_the_variance_by_the_number_of_draws():
    x = torch.full((4000, 1, 1, 2), 0.5)  # so many independent victims
    variances = []
    for draws in (1, 4, 16):
        victim = NoiseFusion(distribution="uniform", amplitude=0.5, draws=draws)(Pixels())
        variances.append(float(victim(x).double().exp()[:, 0].var()))
    # Three standard errors of a ratio of two variances.
    for draws, variance in zip((4, 16), variances[1:], strict=True):
        assert variance == pytest.approx(variances[0] / draws, rel=3 * (4 / 4000) ** 0.5)


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("at_run_time", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_the_four_cells_whatever_mode_the_network_is_in(in_training, at_run_time, mode):
    part = NoiseFusion(in_training=in_training, at_run_time=at_run_time, draws=5)
    defense = Defense(wrap={"noise_fusion": part})
    x = torch.rand(6, 1, 2, 2)
    for build_model, noisy_here, draws in (
        (defense.through, in_training, 1),
        (defense.apply, at_run_time, 5),
    ):
        network = Pixels()
        model = build_model(network).train(mode)
        same = torch.equal(model(x), model(x))
        assert same is not noisy_here and is_randomized(model) is noisy_here
        assert network.images == 2 * 6 * (draws if noisy_here else 1)
        assert (model is network) is not noisy_here


def test_training_only_and_both_share_weights_that_fit_the_bare_network(digits, tmp_path):
    few = replace(digits, train=replace(digits.train, images=digits.train.images[:64],
                                        labels=digits.train.labels[:64]))  # fmt: skip
    found = {}
    for cell in ((False, False), (False, True), (True, False), (True, True)):
        part = NoiseFusion(in_training=cell[0], at_run_time=cell[1])
        through = Defense(wrap={"noise_fusion": part}).through
        found[cell] = fit(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), few, Standard(),
            Schedule(epochs=1, batch_size=16, learning_rate=0.01), seed=0,
            device=torch.device("cpu"), cache=tmp_path / str(cell), key={}, through=through,
        )  # fmt: skip
    hashes = {cell: trained.sha256 for cell, trained in found.items()}
    assert hashes[False, False] == hashes[False, True] != hashes[True, True]
    assert hashes[True, False] == hashes[True, True]
    assert set(found[True, True].model.state_dict()) == {"1.weight", "1.bias"}


def test_settings_of_the_run_time_train_nothing_again():
    def described(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", ["defense=noise_fusion", *overrides])
        settings = OmegaConf.to_container(config, resolve=True)
        return describe_part(settings["defense"]["wrap"]["noise_fusion"])

    key = "defense.wrap.noise_fusion"
    known = described()
    assert described(f"{key}.draws=1", f"{key}.at_run_time=false", f"{key}.eot_samples=7") == known
    assert described(f"{key}.amplitude=0.1") != known
    assert described(f"{key}.distribution=laplace") != known


@pytest.mark.parametrize(("dataset", "amplitude"), [("mnist", 0.3), ("cifar10", 8 / 255)])
def test_the_amplitude_follows_the_dataset(dataset, amplitude):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["defense=noise_fusion", f"dataset={dataset}"])
    assert build(config.defense.wrap)["noise_fusion"].amplitude == amplitude


@pytest.mark.parametrize(("draws", "looks"), [(1, 20), (3, 7), (10, 2), (20, 2), (64, 2)])
def test_an_attacker_averages_as_many_passes_and_never_a_single_look(draws, looks):
    assert declared_samples(NoiseFusion(draws=draws)(Pixels())) == looks


def test_eot_on_a_linear_model_converges_to_the_noiseless_gradient():
    """A pass has the noiseless gradient at the pixels it leaves inside the box, else 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 6, 6, generator=generator)
    model = LinearVictim(torch.randn(2, 36, generator=generator), torch.zeros(2))
    y, samples = torch.tensor([0, 1]), 1500
    clean = input_gradient(model, x, y, loss="margin").gradient
    for distribution, unit in UNITS.items():
        part = NoiseFusion(distribution=distribution, amplitude=0.3, draws=1)
        victim = part.through(model)
        look = input_gradient(victim, x, y, loss="margin", eot_samples=samples)
        share = (look.gradient / samples / clean).numpy()
        inside = unit.cdf((1 - x.numpy()) / 0.3) - unit.cdf(-x.numpy() / 0.3)
        deviation = np.sqrt(inside * (1 - inside) / samples)
        assert (np.abs(share - inside) < 5 * deviation + 1e-4).all()
    # 20 samples, as declared, agree in direction with the noiseless gradient; one does not.
    victim = NoiseFusion(amplitude=0.3, draws=1)(model)
    signs = [
        (input_gradient(victim, x, y, eot_samples=n).gradient.sign() == clean.sign()).float().mean()
        for n in (1, declared_samples(victim))
    ]
    assert signs[1] == 1 > signs[0]


def test_pgd_with_eot_beats_pgd_with_one_draw(digit_model, digit_images):
    x, y = (part[:150] for part in digit_images)
    threat = ThreatModel(norm="linf", epsilon=0.1)
    defense = Defense(wrap={"noise": NoiseFusion(amplitude=0.3, draws=1, in_training=False)})
    robust = {}
    for samples in (1, 20):
        victim = defense.apply(digit_model)
        x_adv = PGD(steps=4, step_size=0.4, eot_samples=samples)(victim, x, y, threat)
        reseed(victim, 123)  # fresh draws, the same for both
        with torch.no_grad():
            rights = [(victim(x_adv).argmax(1) == y).double().mean() for _ in range(10)]
        robust[samples] = float(torch.stack(rights).mean())
    assert robust[20] < robust[1] - 0.08


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amplitude": -0.1}, r"noise_fusion\.amplitude=-0\.1; expected a number above 0.*type"),
        ({"amplitude": 0}, r"noise_fusion\.amplitude=0;"),
        ({"amplitude": float("nan")}, r"noise_fusion\.amplitude=nan;"),
        ({"amplitude": "much"}, r"noise_fusion\.amplitude=much;"),
        ({"distribution": "cauchy"}, r"distribution=cauchy; expected one of uniform, gaussian"),
        ({"draws": 0}, r"noise_fusion\.draws=0; expected a whole number, 1 or more.*type"),
        ({"draws": 2.5}, r"noise_fusion\.draws=2\.5;"),
        ({"eot_samples": 0}, r"noise_fusion\.eot_samples=0;"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        NoiseFusion(**settings)


def test_amplitudes_may_be_written_as_fractions():
    assert NoiseFusion(amplitude="8/255").amplitude == 8 / 255

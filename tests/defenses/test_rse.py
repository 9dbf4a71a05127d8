"""Noise in front of the layers of any network, for the time of a pass."""

import copy

import numpy as np
import pytest
import torch
from conftest import accuracy, digit_cnn, train
from scipy import stats
from torch import nn

from robustbench_local.attacks import PGD
from robustbench_local.defenses import RSE, Defense, Preprocess, Wrapped
from robustbench_local.defenses.defense import declared_samples
from robustbench_local.defenses.detection import Calibration, Detecting, Scorer
from robustbench_local.errors import UserError
from robustbench_local.gradients import is_randomized
from robustbench_local.models import Normalized
from robustbench_local.models.mlp import MLP
from robustbench_local.models.resnet import ResNet
from robustbench_local.randomness import reseed
from robustbench_local.threat import ThreatModel

SEEN: list[torch.Tensor] = []


class Watched(nn.Conv2d):
    """A convolution that keeps what it is given."""

    def forward(self, x):
        SEEN.append(x.detach())
        return super().forward(x)


class WatchedLinear(nn.Linear):
    def forward(self, x):
        SEEN.append(x.detach())
        return super().forward(x)


def watched(*, channels=1, normalized=True):
    """Two convolutions and a linear layer; the first one says 0, so the second is given noise."""
    first = Watched(channels, 4, 3, padding=1)
    nn.init.zeros_(first.weight)
    nn.init.zeros_(first.bias)
    network = nn.Sequential(first, Watched(4, 4, 3, padding=1), nn.Flatten(), WatchedLinear(400, 3))
    return Normalized(network, [0.4], [0.25], channels=channels) if normalized else network


def inputs(model, x):
    SEEN.clear()
    model(x)
    return list(SEEN)


def traces(network):
    """Everything that a hook could be left in."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return [kind for part in network.modules() for kind in kinds if getattr(part, kind)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_noise_is_normal_and_in_pixel_units_on_the_image(normalized, channels):
    network = watched(channels=channels, normalized=normalized)
    x = torch.rand(60, channels, 10, 10)
    plain = inputs(network, x)
    noisy = inputs(RSE(init=0.2, inner=0.1).through(network), x)
    scale = 0.25 if normalized else 1.0  # from normalised values back to pixels
    first = (noisy[0] - plain[0]) * scale
    assert stats.kstest(first.flatten().numpy(), stats.norm(0, 0.2).cdf).pvalue > 0.01
    second = noisy[1] - plain[1]
    assert stats.kstest(second.flatten().numpy(), stats.norm(0, 0.1).cdf).pvalue > 0.01
    # With convolutions the linear layers get none of their own: what they see is what comes out.
    out = torch.nn.functional.conv2d(noisy[1], *last_convolution(network), padding=1)
    assert torch.allclose(noisy[2], out.flatten(1), atol=1e-6)


def last_convolution(network):
    layer = [part for part in network.modules() if isinstance(part, Watched)][-1]
    return layer.weight, layer.bias


def test_channels_last_activations_get_the_same_kind_of_noise_and_stay_so():
    """Every layer but the first of the shipped networks meets such ones."""
    victim = RSE(init=0.2, inner=0.1).through(watched(channels=3))
    entering = torch.zeros(20, 6, 12, 10).contiguous(memory_format=torch.channels_last)
    noise = victim.change(entering, 2)  # the first is the image, the second behind normalisation
    assert noise.is_contiguous(memory_format=torch.channels_last)
    assert stats.kstest(noise.flatten().numpy(), stats.norm(0, 0.1).cdf).pvalue > 0.01
    for apart in (noise.flatten(1).T, noise.transpose(0, 1).flatten(1).T):  # images, channels
        correlations = np.corrcoef(apart.numpy(), rowvar=False)
        np.fill_diagonal(correlations, 0)
        assert np.abs(correlations).max() < 5 / len(apart) ** 0.5


def test_every_image_has_its_own_noise():
    noisy = inputs(RSE().through(watched()), torch.full((2, 1, 10, 10), 0.5))
    for values in noisy[:2]:
        correlation = np.corrcoef(values[0].flatten(), values[1].flatten())[0, 1]
        assert abs(correlation) < 4 / values[0].numel() ** 0.5


def test_a_network_without_convolutions_gets_it_on_its_linear_layers():
    network = nn.Sequential(nn.Flatten(), WatchedLinear(100, 50), WatchedLinear(50, 3))
    nn.init.zeros_(network[1].weight)
    x = torch.rand(80, 1, 10, 10)
    plain, noisy = inputs(network, x), inputs(RSE(init=0.3, inner=0.05).through(network), x)
    for before, after, deviation in zip(plain, noisy, (0.3, 0.05), strict=True):
        drawn = (after - before).flatten().numpy()
        assert stats.kstest(drawn, stats.norm(0, deviation).cdf).pvalue > 0.01


@pytest.mark.parametrize(("init", "inner", "expected"), [(0.2, 0, (1, 0)), (0, 0.1, (0, 1))])
def test_either_noise_may_be_left_out(init, inner, expected):
    network, x = watched(), torch.rand(3, 1, 10, 10)
    plain, noisy = inputs(network, x), inputs(RSE(init=init, inner=inner).through(network), x)
    differ = tuple(int(not torch.equal(*pair)) for pair in zip(plain[:2], noisy[:2], strict=True))
    assert differ == expected


def test_nothing_is_left_on_the_network():
    network, x = watched(), torch.rand(3, 1, 10, 10)
    names, before = list(network.state_dict()), network(x)
    victim = RSE(ensembles=3)(network)
    assert not torch.equal(victim(x), victim(x))
    assert traces(network) == [] and list(network.state_dict()) == names
    assert torch.equal(network(x), before)
    loss = victim(x.requires_grad_()).sum()
    loss.backward()
    assert x.grad is not None and traces(network) == []


def test_nothing_is_left_on_the_network_after_an_exception():
    network = watched()
    victim = RSE()(network)
    with pytest.raises(RuntimeError):
        victim(torch.rand(3, 5, 10, 10))  # five channels
    assert traces(network) == []
    x = torch.rand(3, 1, 10, 10)
    assert torch.equal(network(x), network(x))


def test_copies_and_two_wrappers_round_one_network_go_their_own_ways():
    network, x = watched(), torch.rand(4, 1, 10, 10)
    one, two = RSE()(network), RSE()(network)
    reseed(one, 1)
    expected = [one(x) for _ in range(3)]
    reseed(one, 1)
    assert torch.equal(one(x), expected[0])
    two(x)
    other = copy.deepcopy(one)
    assert torch.equal(one(x), expected[1]) and torch.equal(other(x), expected[1])
    assert torch.equal(one(x), expected[2])
    assert other.model.model is not network and traces(other) == []
    # A copy of the wrapped network alone is the plain network.
    assert torch.equal(copy.deepcopy(one.model.model)(x), network(x))


def test_one_inside_the_other_adds_both():
    network, x = watched(normalized=False), torch.full((100, 1, 10, 10), 0.5)
    both = RSE(init=0.3, inner=0.1).through(RSE(init=0.4, inner=0.1).through(network))
    reseed(both, 1)
    first = inputs(both, x)[0] - 0.5
    assert stats.kstest(first.flatten().numpy(), stats.norm(0, 0.5).cdf).pvalue > 0.01


def test_layers_of_a_transform_inside_stay_exact():
    class Blur(Preprocess):
        def __init__(self):
            super().__init__()
            self.layer = Watched(1, 1, 3, padding=1)

        def transform(self, x):
            return self.layer(x).clamp(0, 1)

    x = torch.rand(3, 1, 10, 10)
    seen = inputs(RSE().through(Wrapped(Blur(), watched(normalized=False))), x)
    assert torch.equal(seen[0], x)
    blurred = inputs(Wrapped(Blur(), watched(normalized=False)), x)
    assert len(seen) == len(blurred) == 4


class Twice(nn.Module):
    """Asks its network about the image and about a darker one, like a vote or a detector."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x) + self.network(x / 2)


@pytest.mark.parametrize("normalized", [False, True])
def test_every_question_to_the_network_begins_with_the_noise_on_the_image(normalized):
    model, x = Twice(watched(normalized=normalized)), torch.rand(60, 1, 10, 10)
    plain, noisy = inputs(model, x), inputs(RSE(init=0.2, inner=0.1).through(model), x)
    scale = 0.25 if normalized else 1.0
    for start in (0, 3):
        first = ((noisy[start] - plain[start]) * scale).flatten().numpy()
        assert stats.kstest(first, stats.norm(0, 0.2).cdf).pvalue > 0.01
        second = (noisy[start + 1] - plain[start + 1]).flatten().numpy()
        assert stats.kstest(second, stats.norm(0, 0.1).cdf).pvalue > 0.01


def test_layers_of_a_detector_inside_stay_exact():
    class Judge(Scorer):
        def __init__(self):
            super().__init__()
            self.layer = Watched(1, 1, 3, padding=1)

        def forward(self, model, x, logits):
            return self.layer(x).mean((1, 2, 3))

    network = watched(normalized=False)
    model = Detecting(network, Judge(), Calibration(0.0, 0.05, 10, 0.0))
    x = torch.rand(3, 1, 10, 10)
    seen = inputs(RSE().through(model), x)
    assert torch.equal(seen[3], x) and not torch.equal(seen[0], x)


def test_draws_come_from_the_own_generator():
    victim, x = RSE()(watched()), torch.rand(2, 1, 10, 10)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    reseed(victim, 3)
    first = victim(x)
    reseed(victim, 4)
    assert not torch.equal(victim(x), first)
    reseed(victim, 3)
    assert torch.equal(victim(x), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("mode", [False, True])
def test_training_sees_one_draw_and_run_time_all_ensembles(mode):
    network, x = watched(), torch.rand(5, 1, 10, 10)
    defense = Defense(wrap={"rse": RSE(ensembles=4)})
    assert sum(len(part) for part in inputs(defense.through(network).train(mode), x)) == 3 * 5
    victim = defense.apply(network).train(mode)
    assert sum(len(part) for part in inputs(victim, x)) == 3 * 5 * 4
    assert is_randomized(victim) and declared_samples(victim) == 5
    off = Defense(wrap={"rse": RSE(in_training=False, at_run_time=False)})
    assert off.through(network) is off.apply(network) is network


@pytest.mark.parametrize("channels", [1, 3])
def test_real_networks_take_it(channels):
    shape = (channels, 17, 13)
    for network in (
        ResNet(input_shape=shape, num_classes=4),
        MLP(input_shape=shape, num_classes=4),
    ):
        victim = RSE(ensembles=2)(Normalized(network, [0.5], [0.2], channels=channels)).eval()
        x = torch.rand(3, *shape, requires_grad=True)
        answer = victim(x)
        assert answer.shape == (3, 4) and not torch.equal(answer, victim(x))
        (gradient,) = torch.autograd.grad(answer[:, 0].sum(), x)
        assert (gradient != 0).any()
        assert torch.allclose(answer.exp().sum(1), torch.ones(3), atol=1e-5)


def test_more_ensembles_agree_more():
    torch.manual_seed(0)
    x = torch.rand(50, 1, 10, 10)
    network = Normalized(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)),
        [0.5], [0.25], channels=1,
    )  # fmt: skip
    spread = {}
    for ensembles in (1, 16):
        victim = RSE(ensembles=ensembles)(network)
        looks = torch.stack([victim(x).detach().exp() for _ in range(40)])
        spread[ensembles] = float(looks.double().var(0).mean())
    assert spread[16] == pytest.approx(spread[1] / 16, rel=0.15)


@pytest.mark.slow
def test_a_network_trained_with_the_noise_stands_it_and_falls_under_eot(digits, digit_images):
    x, y = digit_images[0][:200], digit_images[1][:200]
    network, part = digit_cnn(), RSE(ensembles=10)
    train(part.through(network), digits.train.pixels(slice(None)), digits.train.labels, epochs=2)
    assert list(network.state_dict()) == list(digit_cnn().state_dict())
    victim = part(network)
    assert accuracy(victim, x, y) > 0.85
    x_adv = PGD(steps=10, step_size=0.25, eot_samples=declared_samples(victim))(
        victim, x, y, ThreatModel(norm="linf", epsilon=0.3)
    )
    assert accuracy(victim, x_adv, y) < 0.1


def test_a_model_without_such_layers_is_told():
    with pytest.raises(UserError, match=r"rse adds noise.*none.*defense=noise_fusion"):
        RSE()(nn.Sequential(nn.Flatten(), nn.Softmax(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": -0.2}, r"rse\.init=-0\.2; expected a standard deviation, 0 or more.*type"),
        ({"inner": float("inf")}, r"rse\.inner=inf;"),
        ({"init": 0, "inner": 0}, r"leave no noise.*type defense\.wrap\.rse\.init=0\.2"),
        ({"ensembles": 0}, r"rse\.ensembles=0; expected a whole number"),
        ({"eot_samples": 1.5}, r"rse\.eot_samples=1\.5;"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        RSE(**settings)

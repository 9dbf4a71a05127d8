"""One-step adversarial training: the two steps in closed form, and a collapse that is caught."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import accuracy, digit_cnn, plain_pgd
from torch import nn

from robustbench_local.attacks import PGD
from robustbench_local.defenses import FastAdversarialTraining
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, fit

EPSILON = 0.1
LINF = ThreatModel(norm="linf", epsilon=EPSILON)


def fast(**settings) -> FastAdversarialTraining:
    return FastAdversarialTraining(threat=LINF, epsilon_ramp=0.0, **settings)


def two_classes(channels: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """A linear scorer, and the sign of its loss's gradient for class 0: the same everywhere."""
    torch.manual_seed(0)
    linear = nn.Linear(channels * 20 * 20, 2)
    sign = (linear.weight[1] - linear.weight[0]).sign().detach().view(channels, 20, 20)
    return nn.Sequential(nn.Flatten(), linear), sign


@pytest.mark.parametrize("channels", [1, 3])
def test_one_step_of_one_and_a_quarter_epsilon_from_a_uniform_point(channels):
    model, sign = two_classes(channels)
    x = torch.full((50, channels, 20, 20), 0.5) + torch.arange(50).view(-1, 1, 1, 1) / 1000
    y = torch.zeros(50, dtype=torch.int64)
    along = (fast().craft(model, x, y, LINF, 7) - x) * sign / EPSILON
    # u + 1.25 brought back to [-1, 1], with u uniform there: 5/8 of it ends at 1.
    assert along.min() >= 0.25 - 1e-5 and along.max() <= 1 + 1e-5
    assert (along > 1 - 1e-5).double().mean() == pytest.approx(0.625, abs=0.01)
    inside = along[along < 1 - 1e-5]
    assert inside.mean() == pytest.approx((0.25 + 1) / 2, abs=0.01)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_and_a_step_that_nothing_brings_back(channels):
    model, sign = two_classes(channels)
    x = torch.full((50, channels, 20, 20), 0.5) + torch.arange(50).view(-1, 1, 1, 1) / 1000
    y = torch.zeros(50, dtype=torch.int64)
    along = (fast(start="noise").craft(model, x, y, LINF, 7) - x) * sign / EPSILON
    # u + 1 with u uniform in [-2, 2]: a quarter of the pixels lie more than 2 epsilon away.
    assert -1 - 1e-5 <= along.min() < -0.98 and 2.98 < along.max() <= 3 + 1e-5
    assert along.mean() == pytest.approx(1, abs=0.02)
    assert along.std() == pytest.approx(4 / 12**0.5, abs=0.02)
    assert (along > 2).double().mean() == pytest.approx(0.25, abs=0.01)
    black = torch.zeros(2, channels, 20, 20)
    crafted = fast(start="noise").craft(model, black, y[:2], LINF, 7)
    assert crafted.min() == 0 and crafted.max() <= 3 * EPSILON + 1e-6


def test_the_gradient_is_that_at_the_noisy_image():
    torch.manual_seed(1)
    seen = []

    class Curved(nn.Sequential):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    model = Curved(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    crafted = fast(start="noise", step_size=0.5).craft(model, x, y, LINF, 7)
    (noisy,) = seen
    assert (noisy - x).abs().max() <= 2 * EPSILON + 1e-6
    assert (noisy - x).abs().max() > EPSILON
    at = noisy.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(at), y), at)
    expected = (noisy + 0.5 * EPSILON * gradient.sign()).clamp(0, 1)
    assert torch.allclose(crafted, expected, atol=1e-6)


def test_without_noise_it_is_fgsm():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(at), y), at)
    crafted = fast(start="noise", noise=0.0).craft(model, x, y, LINF, 7)
    assert torch.allclose(crafted, (x + EPSILON * gradient.sign()).clamp(0, 1), atol=1e-6)


def test_noise_grows_with_the_ramp_and_is_that_of_seed_and_image():
    model, _ = two_classes()
    x, y = torch.rand(4, 1, 20, 20), torch.zeros(4, dtype=torch.int64)
    recipe = fast(start="noise")
    small = ThreatModel(norm="linf", epsilon=0.01)
    assert (recipe.craft(model, x, y, small, 7) - x).abs().max() <= 0.03 + 1e-6
    first = recipe.craft(model, x, y, LINF, 7)
    assert torch.equal(first[2:], recipe.craft(model, x[2:], y[2:], LINF, 7))
    assert not torch.equal(first, recipe.craft(model, x, y, LINF, 8))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"start": "zero"}, r"fast_adversarial_training\.start=zero; expected uniform or noise"),
        ({"step_size": 0}, "step_size=0;"),
        ({"noise": -1}, "noise=-1;"),
        ({"epsilon_ramp": 2}, "epsilon_ramp=2;"),
    ],
)
def test_wrong_settings_are_told(settings, told):
    with pytest.raises(UserError, match=told):
        FastAdversarialTraining(**{"threat": LINF, **settings})


def test_noise_is_for_linf():
    with pytest.raises(UserError, match=r"type defense\.recipe\.fast_adversarial_training\.start"):
        FastAdversarialTraining(threat=ThreatModel(norm="l2", epsilon=1), start="noise")
    with pytest.raises(UserError, match="l0"):
        FastAdversarialTraining(threat=ThreatModel(norm="l0", epsilon=1))


@pytest.mark.slow
def test_a_collapse_on_real_digits_is_caught_and_rolled_back(digits, tmp_path):
    """Long steps from the image itself, under a learning rate that rises until it is too much."""
    threat = ThreatModel(norm="linf", epsilon=0.2)
    recipe = FastAdversarialTraining(
        threat=threat, start="noise", noise=0.0, step_size=1.5, epsilon_ramp=0.1,
        validation=PGD(steps=5, step_size=0.5),
    )  # fmt: skip
    schedule = Schedule(epochs=8, batch_size=64, learning_rate=0.04, warmup=0.98)

    def train(schedule):
        return fit(
            digit_cnn, digits, recipe, schedule, seed=0, device=torch.device("cpu"),
            cache=tmp_path, key={"model": "cnn"},
        )  # fmt: skip

    def robust(trained):
        return [entry["robust_validation_accuracy"] for entry in trained.history]

    trained = train(schedule)
    best, last = robust(trained)[trained.epoch - 1], robust(trained)[-1]
    assert best == max(robust(trained)[1:]) > 0.5 and last < 0.3
    told = [one for one in trained.warnings if one.startswith("catastrophic_overfitting: ")]
    assert f"epoch {trained.epoch} was selected" in told[0] and f"{best:.1%}" in told[0]
    # What is returned is that epoch: measured anew, by another implementation of the attack.
    x, y = digits.validation.pixels(slice(None)), digits.validation.labels
    x_adv = plain_pgd(trained.model, x, y, epsilon=0.2, step=0.1, steps=5)
    assert accuracy(trained.model, x_adv, y) == pytest.approx(best, abs=0.05)

    early = train(replace(schedule, patience=1))
    assert len(early.history) == early.epoch + 1 < len(trained.history)
    assert robust(early) == robust(trained)[: len(early.history)]

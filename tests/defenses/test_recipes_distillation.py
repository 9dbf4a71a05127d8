"""Defensive distillation: the two losses, the student's answers, and what breaks it."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import accuracy, digit_cnn, plain_pgd
from torch import nn

from robustbench_local.attacks import PGD
from robustbench_local.defenses import Defense, Distillation, NoiseFusion
from robustbench_local.defenses.distillation import Heated
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, Trained, Workshop
from robustbench_local.training.step import Step

CPU = torch.device("cpu")


def make(channels: int, seed: int):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 3))


def batch(channels: int):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(9, channels, 4, 4, generator=generator), torch.arange(9) % 3


def step(recipe, model, x, y, criterion=F.cross_entropy):
    return recipe.loss(model, Step(x, y, criterion=criterion, progress=0.5, number=1, seed=0))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_teacher_learns_labels_at_the_temperature(channels):
    model, (x, y) = make(channels, 0), batch(channels)
    loss, logits = step(Heated(temperature=7.0), model, x, y)
    powers = (model(x) / 7).exp()
    picked = powers[torch.arange(9), y] / powers.sum(1)
    assert torch.allclose(loss, -7 * picked.log().mean())
    assert torch.equal(logits, model(x))  # at run time the temperature is 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_learns_what_the_teacher_says_at_the_temperature(channels):
    teacher, model, (x, y) = make(channels, 0), make(channels, 1), batch(channels)
    recipe = replace(Distillation(temperature=7.0), teacher=(teacher,))
    loss, logits = step(recipe, model, x, y)
    said = (teacher(x) / 7).exp() / (teacher(x) / 7).exp().sum(1, keepdim=True)
    own = (model(x) / 7).exp() / (model(x) / 7).exp().sum(1, keepdim=True)
    assert torch.allclose(loss, -7 * (said * own.log()).sum(1).mean())
    assert torch.equal(logits, model(x))
    loss.backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    # Labels play no part, and the teacher's own weights are the best there are.
    assert torch.equal(loss, step(recipe, model, x, (y + 1) % 3)[0])
    model.load_state_dict(teacher.state_dict())
    model.zero_grad()
    step(recipe, model, x, y)[0].backward()
    assert all(weight.grad.abs().max() < 1e-6 for weight in model.parameters())


def test_the_teacher_is_asked_behind_the_noise_it_was_trained_behind():
    """With draws of its own, which derive from the seed and the step."""

    @dataclass(frozen=True, kw_only=True)
    class Taught(Workshop):
        def train(self, build, recipe, **options):
            assert options["through"] == self.through
            return Trained.given(make(1, 0).eval(), "0" * 64)

    noise = NoiseFusion(distribution="bernoulli", amplitude=0.1, in_training=True)
    x, y = batch(1)
    place = Taught(
        data=None, device=CPU, cache=None, seed=0, build=None, model={}, schedule=None,
        through=Defense(wrap={"noise": noise}).through,
    )  # fmt: skip
    recipe = Distillation(temperature=2.0).prepare(place)
    met = []
    taught = next(part for part in recipe.teacher[0].modules() if isinstance(part, nn.Linear))
    taught.register_forward_hook(lambda layer, inputs, output: met.append(inputs[0].view_as(x)))
    losses = [step(recipe, make(1, 1), x, y)[0] for _ in range(2)]
    inside = (x - 0.1 > 0) & (x + 0.1 < 1)
    assert torch.allclose((met[0] - x).abs()[inside], torch.tensor(0.1))
    assert torch.equal(met[0], met[1]) and torch.equal(*losses)
    other = Step(x, y, criterion=F.cross_entropy, progress=0.5, number=2, seed=0)
    recipe.loss(make(1, 1), other)
    assert not torch.equal(met[2], met[0])


def workshop(digits, cache, epochs: int = 4) -> Workshop:
    return Workshop(
        data=digits, device=CPU, cache=cache, seed=0, build=digit_cnn, model={"model": "digits"},
        schedule=Schedule(epochs=epochs, batch_size=64, learning_rate=0.005),
    )  # fmt: skip


@pytest.fixture(scope="module")
def distilled(digits, tmp_path_factory):
    """The recipe with its teacher, and the network, trained at temperature 100."""
    place = workshop(digits, tmp_path_factory.mktemp("distilled"))
    recipe = Distillation(temperature=100.0).prepare(place)
    return place, recipe, place.classifier(recipe)


@pytest.mark.slow
def test_the_teacher_is_trained_through_the_cache_once(distilled):
    place, recipe, trained = distilled
    (teacher,) = recipe.teacher
    known = place.classifier(Heated(temperature=100.0))
    assert known.cached and known.key != trained.key
    for one, other in zip(known.model.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(one, other) and not other.requires_grad
    assert not teacher.training
    again = place.classifier(Distillation(temperature=100.0).prepare(place))
    assert again.cached and again.sha256 == trained.sha256


@pytest.mark.slow
def test_the_network_says_what_the_teacher_says(distilled, digits):
    _, recipe, trained = distilled
    x = digits.test.pixels(slice(None))
    with torch.no_grad():
        said, own = ((one(x) / 100).softmax(1) for one in (recipe.teacher[0], trained.model))
        plain = trained.model(x).softmax(1)
    assert (said - own).abs().sum(1).mean() < 0.2  # of 2
    assert own.amax(1).mean() < 0.95 and plain.amax(1).mean() > 0.98  # saturated at run time


@pytest.mark.slow
def test_cross_entropy_finds_no_gradient_and_logits_break_every_image(distilled, digit_images):
    _, _, trained = distilled
    x, y = (part[:200] for part in digit_images)
    model, threat = trained.model, ThreatModel(norm="linf", epsilon=0.3)
    assert accuracy(model, x, y) > 0.85
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(at), y), at)
    assert (gradient.flatten(1).abs().amax(1) == 0).double().mean() > 0.6
    assert accuracy(model, plain_pgd(model, x, y, epsilon=0.3, step=0.03, steps=20), y) > 0.5
    for loss in ("ce", "margin", "dlr"):
        assert accuracy(model, PGD(steps=20, loss=loss)(model, x, y, threat), y) < 0.02


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match=r"temperature=0\.5; expected a number from 1 to 1000"):
        Distillation(temperature=0.5)
    with pytest.raises(RuntimeError, match="no teacher yet"):
        step(Distillation(temperature=2.0), make(1, 0), *batch(1))

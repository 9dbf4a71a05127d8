"""The learned denoiser: what it is trained on and for, and that it falls end to end."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from conftest import accuracy
from torch import nn
from torch.nn import functional

from robustbench_local.attacks import PGD, Attack
from robustbench_local.data import Dataset, Split
from robustbench_local.defenses import Defense, Denoiser, Standard, Wrapped
from robustbench_local.defenses.denoiser import Residual
from robustbench_local.defenses.denoiser_training import Behind, Denoising, OnClassifier
from robustbench_local.errors import UserError
from robustbench_local.gradients import input_gradient
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, Trained, Workshop
from robustbench_local.training.step import Step

THREAT = ThreatModel(norm="linf", epsilon=0.3)
ATTACK = PGD(steps=3, step_size=0.5, early_stop=False, best_iterate=False)
CPU = torch.device("cpu")


def recipe(classifier=None, **settings):
    known = {
        "attack": ATTACK, "threat": THREAT, "adversarial_share": 0.5, "noise": 0.3,
        "pixel_weight": 1.0, "feature_weight": 0.1, "layer": None,
    }  # fmt: skip
    made = Denoising(**{**known, **settings})
    return made if classifier is None else made.on(classifier)


def classifier(channels=1, side=8):
    """With batch statistics, which training it would move."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * side * side, 3),
    )  # fmt: skip
    network(torch.rand(32, channels, side, side))
    return network.eval()


def images(count=12, channels=1, side=8):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, channels, side, side, generator=generator), torch.arange(count) % 3


class Brighter(nn.Module):
    """A denoiser that adds a tenth to every pixel."""

    def forward(self, x):
        return x + 0.1


def loss(made, denoiser, x, y):
    model = Behind(denoiser, made.classifier)
    return made.loss(
        model, Step(x, y, criterion=functional.cross_entropy, progress=0.3, number=5, seed=2)
    )  # fmt: skip


def test_pixel_loss_is_the_mean_absolute_error():
    x, y = images()
    made = recipe(classifier(), adversarial_share=0, noise=1e-9, pixel_weight=2, feature_weight=0)
    value, logits = loss(made, Brighter(), x, y)
    assert value.item() == pytest.approx(0.2, rel=1e-4)
    assert torch.allclose(logits, made.classifier((x + 0.1).clamp(0, 1)), atol=1e-5)


@pytest.mark.parametrize("layer", [None, "0", "2"])
def test_feature_loss_is_that_of_the_logits_or_of_the_layer_named(layer):
    x, y = images()
    network = classifier()
    made = recipe(
        network, adversarial_share=0, noise=1e-9, pixel_weight=0, feature_weight=3, layer=layer
    )
    value, logits = loss(made, Brighter(), x, y)
    upto = network if layer is None else network[: int(layer) + 1]
    cleaned = (x + 0.1).clamp(0, 1)
    with torch.no_grad():
        expected = 3 * (upto(cleaned) - upto(x)).abs().mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(logits, network(cleaned), atol=1e-5)
    assert not any(part._forward_hooks for part in network.modules())


def test_a_share_is_attacked_on_the_bare_classifier_within_the_budget():
    x, y = images(400)
    network = classifier()
    made = recipe(network, adversarial_share=0.25, noise=0.2)
    seen = made.perturb(x, y, 1)
    assert seen.shape == x.shape and seen.min() >= 0 and seen.max() <= 1
    THREAT.check(seen[:100], x[:100])
    sizes = THREAT.size(seen[:100], x[:100])
    assert sizes.min() < 0.05 and sizes.max() > 0.25  # a radius of its own for each
    with torch.no_grad():
        worse = functional.cross_entropy(network(seen[:100]), y[:100], reduction="none")
        before = functional.cross_entropy(network(x[:100]), y[:100], reduction="none")
    assert (worse > before).double().mean() > 0.95
    # The rest: normal noise, the deviation of each image uniform from 0 to 0.2.
    inside = (seen[100:] > 0) & (seen[100:] < 1)
    residual = (seen[100:] - x[100:]).where(inside, torch.nan).flatten(1)
    assert residual.nanmean().abs() < 0.005
    deviations = residual.square().nanmean(1).sqrt()
    assert deviations.min() < 0.01 and 0.15 < deviations.max() < 0.25
    assert torch.equal(made.perturb(x, y, 1), seen)
    assert not torch.equal(made.perturb(x, y, 2), seen)


def test_a_batch_may_be_attacked_or_noisy_alone():
    x, y = images(40)
    attacked = recipe(classifier(), adversarial_share=1, noise=0).perturb(x, y, 0)
    assert 0.25 < float((attacked - x).abs().max()) <= 0.3 + 1e-6
    noisy = recipe(classifier(), adversarial_share=0, noise=1).perturb(x, y, 0)
    assert float((noisy - x).abs().max()) > 0.9
    budget = ThreatModel(norm="l2", epsilon=2)
    other = recipe(classifier(), threat=budget, adversarial_share=1, noise=0).perturb(x, y, 0)
    budget.check(other, x)


@dataclass(frozen=True, kw_only=True)
class Darken(Attack):
    """Serves one radius for all, and spends it."""

    needs: ClassVar = "labels"
    norms: ClassVar = frozenset({"linf"})

    def run(self, model, x, y, threat):
        assert threat.radii is None
        return (x - threat.epsilon).clamp(0, 1)


def test_an_attack_without_radii_for_each_image_uses_the_whole_budget():
    x, y = images(20)
    seen = recipe(classifier(), attack=Darken(), adversarial_share=1, noise=0).perturb(x, y, 0)
    assert torch.equal(seen, (x - 0.3).clamp(0, 1))


def test_validation_images_are_those_that_fool_the_bare_classifier():
    x, y = images(30)
    network = classifier()
    attack, threat = recipe(network).validation_attack()
    assert threat == THREAT and isinstance(attack, OnClassifier)
    found = attack(Wrapped(nn.Hardtanh(0, 0.1), network), x, y, threat)
    assert torch.equal(found, ATTACK(network, x, y, threat))


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 9, 5), (1, 4, 1, 1), (2, 1, 7, 12)])
def test_the_network_takes_any_channels_and_sizes_and_starts_as_the_identity(shape):
    network, x = Residual(channels=shape[1], width=8, depth=3), torch.rand(shape)
    assert torch.equal(network(x), x)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)
    out = network(x)
    assert out.shape == x.shape and not torch.allclose(out, x)
    # What a pixel becomes does not depend on what is far away.
    if shape[-1] == 28:
        x[..., 27] = 1 - x[..., 27]
        assert torch.equal(network(x)[..., :12], out[..., :12])


def workshop(tmp_path, network, *, channels=1, sha256="abc"):
    x, y = images(72, channels=channels)
    every = Split((x * 255).to(torch.uint8), y, torch.arange(72))
    data = Dataset(
        name="toy", source="files", train=every, validation=every, test=every,
        class_names=("a", "b", "c"), test_total=72, fingerprint=f"toy{channels}",
        test_fingerprint="toy", notes=(),
    )  # fmt: skip
    return Workshop(
        data=data, device=CPU, cache=tmp_path, seed=0,
        schedule=Schedule(epochs=1, batch_size=16, learning_rate=0.01),
        build=classifier, model={}, network=Trained.given(network, sha256),
    )  # fmt: skip


def small(**settings):
    known = {"attack": ATTACK, "threat": THREAT, "width": 4, "depth": 3, "epochs": 2,
             "min_steps": 8, "batch_size": 24}  # fmt: skip
    return Denoiser(**{**known, **settings})


@pytest.mark.parametrize("channels", [1, 3])
def test_the_classifier_stays_as_it_is(channels, tmp_path):
    network = classifier(channels)
    network[1].train()  # a mode of its own, to be found again
    before = copy.deepcopy(network.state_dict())
    modes = [part.training for part in network.modules()]
    fitted = small(layer="2").fit(workshop(tmp_path, network, channels=channels))
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [part.training for part in network.modules()] == modes
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())
    assert fitted.network is not None and fitted.learned["sha256"]
    x = images(5, channels=channels)[0]
    victim = Defense(wrap={"denoiser": fitted}).apply(network.eval())
    out = victim.preprocess(x)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1 and not torch.equal(out, x)
    assert torch.equal(victim(x), network(out))


def test_it_is_trained_once_for_each_network_and_lesson(tmp_path):
    network = classifier()
    first = small().fit(workshop(tmp_path, network))
    same = small().fit(workshop(tmp_path, network))
    assert same.learned == first.learned
    assert len(list((tmp_path / "weights").glob("*.json"))) == 1
    for other, shop in (
        (small(), workshop(tmp_path, network, sha256="other")),
        (small(feature_weight=1), workshop(tmp_path, network)),
        (small(layer="2"), workshop(tmp_path, network)),
        (small(width=5), workshop(tmp_path, network)),
        (small(threat=replace(THREAT, epsilon=0.1)), workshop(tmp_path, network)),
        (small(learning_rate=0.01), workshop(tmp_path, network)),
    ):
        assert other.fit(shop).learned["key"] != first.learned["key"]
    # The same bytes anywhere, and nothing that run time alone decides.
    again = small(at_run_time=False).fit(workshop(tmp_path / "elsewhere", network))
    assert again.learned["sha256"] == first.learned["sha256"]
    assert again.learned["key"] == first.learned["key"]


def test_weights_save_and_load(tmp_path):
    network = classifier()
    fitted = small().fit(workshop(tmp_path, network))
    victim = Defense(wrap={"denoiser": fitted}).apply(network)
    torch.save(victim.state_dict(), tmp_path / "victim.pt")
    other = Defense(wrap={"denoiser": small(noise=0.1).fit(workshop(tmp_path, network))})
    fresh = other.apply(classifier())
    x = images(4)[0]
    assert not torch.equal(fresh(x), victim(x))
    fresh.load_state_dict(torch.load(tmp_path / "victim.pt", weights_only=True))
    assert torch.equal(fresh(x), victim(x))


def test_the_gradient_is_the_true_one(tmp_path):
    """Against finite differences, in float64."""
    network = classifier()
    victim = Defense(wrap={"denoiser": small().fit(workshop(tmp_path, network))}).apply(network)
    victim.double()
    x, y = images(3)
    x = (0.2 + 0.6 * x).double()  # what the denoiser makes of it stays inside the box
    step = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    gradient = input_gradient(victim, x, y, loss="margin").gradient

    def margin(at):
        return input_gradient(victim, at, y, loss="margin").loss

    found = (margin(x + step) - margin(x - step)) / 2
    assert torch.allclose(found, (gradient * step).flatten(1).sum(1), rtol=1e-4)


def test_before_it_is_trained_it_cannot_be_used():
    with pytest.raises(ValueError, match="not trained yet"):
        small()(images(2)[0])


@pytest.mark.slow
def test_it_takes_an_oblivious_attack_away_and_falls_to_one_end_to_end(
    digits, digit_images, digit_model, tmp_path
):
    shop = Workshop(
        data=digits, device=CPU, cache=tmp_path, seed=0,
        schedule=Schedule(epochs=1, batch_size=16, learning_rate=0.01),
        build=lambda: digit_model, model={}, network=Trained.given(digit_model, "digits"),
    )  # fmt: skip
    part = Denoiser(attack=ATTACK, threat=THREAT, width=16, depth=5, epochs=1, min_steps=300)
    defense = Defense({"standard": Standard()}, {"denoiser": part}).fit(shop)
    victim = defense.apply(digit_model)
    x, y = digit_images[0][:200], digit_images[1][:200]
    attack = PGD(steps=20, step_size=0.2)
    oblivious = attack(digit_model, x, y, THREAT)
    assert accuracy(digit_model, oblivious, y) < 0.05
    assert accuracy(victim, x, y) > 0.93
    assert accuracy(victim, oblivious, y) > 0.75
    assert accuracy(victim, attack(victim, x, y, THREAT), y) < 0.05
    learned = defense.wrap["denoiser"].learned
    assert learned["validation"]["robust_validation_accuracy"] > 0.6
    assert learned["warnings"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": -0.1}, r"denoiser\.noise=-0\.1; expected a standard deviation.*type"),
        ({"adversarial_share": 1.2}, r"adversarial_share=1\.2; expected the share.*type"),
        ({"adversarial_share": "half"}, r"adversarial_share=half;"),
        ({"adversarial_share": 0, "noise": 0}, r"nothing to take away.*noise=0\.3"),
        ({"pixel_weight": -1}, r"pixel_weight=-1; expected the weight of a loss"),
        ({"feature_weight": float("nan")}, r"feature_weight=nan;"),
        ({"pixel_weight": 0, "feature_weight": 0}, r"nothing to learn.*type"),
        ({"width": 0}, r"denoiser\.width=0; expected a whole number"),
        ({"depth": 1}, r"denoiser\.depth=1; expected a whole number, 2 or more"),
        ({"epochs": 0}, r"epochs=0"),
        ({"threat": ThreatModel(norm="l0", epsilon=3)}, r"does not serve threat\.norm=l0"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        Denoiser(**{"attack": ATTACK, "threat": THREAT, **settings})


def test_a_layer_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"layer=head is no layer.*expected one of 0, 1, 2, 3, 4"):
        small(layer="head").fit(workshop(tmp_path, classifier()))

"""The traps in torchattacks and ART are still there: each refusal and correction is deserved.

A test that fails here after an upgrade says that the trap is gone.
"""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from conftest import LinearVictim, accuracy
from torch import Tensor, nn

from robustbench_local import spatial
from robustbench_local.attacks import ART, PGD, TorchAttacks
from robustbench_local.threat import ThreatModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import art.attacks.evasion as evasion
    from art.estimators.classification import PyTorchClassifier

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = (1, 8, 8)


def linear(classes: int = 5, **how: float) -> LinearVictim:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(classes, 64, generator=generator)
    return LinearVictim(weight, -weight.sum(1) / 2, **how)


@pytest.fixture
def x() -> Tensor:
    """A third of the pixels exactly 0, a third exactly 1."""
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.rand(30, *SHAPE, generator=generator) - 1).clamp(0, 1)


@pytest.fixture
def inner() -> Tensor:
    """No pixel near 0 or 1."""
    return 0.3 + 0.4 * torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(1))


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


class Castable(nn.Module):
    def __init__(self, model: nn.Module, *, softmax: bool = False) -> None:
        super().__init__()
        self.model, self.softmax = model, softmax

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x.float())
        return logits.softmax(1) if self.softmax else logits


def generate(
    name: str, model: nn.Module, x: Tensor, y: Tensor, *, cast: bool = True, **how: Any
) -> Tensor:
    classifier = PyTorchClassifier(
        Castable(model) if cast else model,
        nn.CrossEntropyLoss(),
        SHAPE,
        5,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = getattr(evasion, name)(classifier, **how)
    return torch.from_numpy(attack.generate(x.numpy(), y=np.eye(5)[y]))


def test_cw_fails_on_negative_logits_and_moves_no_saturated_pixel(x: Tensor, inner: Tensor) -> None:
    shifted = linear(shift=-50)
    y = predict(shifted, inner)
    adv = torchattacks.CW(shifted, c=1, steps=30)(inner, y)
    assert accuracy(shifted, adv, y) > 0.9
    plain = linear()
    y = predict(plain, x)
    adv = torchattacks.CW(plain, c=10, steps=30)(x, y)
    held = (x == 0) | (x == 1)
    assert torch.equal(adv[held], x[held])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EADL1", "EADEN"])
def test_ead_wastes_distance_on_negative_logits_and_ours_does_not(name: str, inner: Tensor) -> None:
    sizes = {}
    for shift in (0.0, -50.0):
        model = linear(shift=shift)
        y = predict(model, inner)
        theirs = getattr(torchattacks, name)(model)(inner, y)
        threat = ThreatModel(norm="l1", epsilon=50)
        ours = TorchAttacks(name=name)(model, inner, y, threat)
        assert accuracy(model, ours, y) == 0
        sizes[shift] = [float(threat.size(adv, inner).median()) for adv in (theirs, ours)]
    assert sizes[-50][0] > 1.15 * sizes[0][1]
    assert sizes[-50][1] == pytest.approx(sizes[0][1], rel=0.02)


def test_the_margin_of_upgd_vanishes_on_negative_logits(inner: Tensor) -> None:
    model = linear(shift=-50)
    y = predict(model, inner)
    theirs = torchattacks.UPGD(model, eps=0.1, alpha=0.025, loss="margin")(inner, y)
    ours = TorchAttacks(name="UPGD", kwargs={"loss": "margin"})(
        model, inner, y, ThreatModel(norm="linf", epsilon=0.1)
    )
    assert accuracy(model, theirs, y) > 0.9
    assert accuracy(model, ours, y) < 0.2


@pytest.mark.slow
def test_ead_leaves_the_box(x: Tensor) -> None:
    model = linear()
    y = predict(model, x)
    theirs = torchattacks.EADL1(model)(x, y)
    assert float(theirs.max()) > 1 + 1e-6 or float(theirs.min()) < -1e-6
    threat = ThreatModel(norm="l1", epsilon=3)
    threat.check(TorchAttacks(name="EADL1")(model, x, y, threat), x)


@pytest.mark.slow
def test_deepfool_of_torchattacks_stalls_at_the_box(x: Tensor, inner: Tensor) -> None:
    model = linear()
    for pixels, stalls in ((inner, False), (x, True)):
        y = predict(model, pixels)
        left = accuracy(model, torchattacks.DeepFool(model)(pixels, y), y)
        assert (left > 0.2) == stalls


def test_autoattack_of_torchattacks_runs_ten_steps() -> None:
    parts = torchattacks.AutoAttack(linear(10), n_classes=10)._autoattack.attacks
    assert [part.steps for part in parts[:3]] == [10, 10, 10]


def test_targeted_spsa_goes_to_the_label(x: Tensor) -> None:
    model = linear()
    y = predict(model, x)
    attack = torchattacks.SPSA(model, eps=0.3, nb_iter=10, lr=0.05)
    attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 5, quiet=True)
    assert accuracy(model, attack(x, y), y) == 1


def test_jsma_aims_at_classes_that_are_not_there(x: Tensor) -> None:
    y = torch.full((2,), 4)
    with pytest.raises(IndexError):
        torchattacks.JSMA(linear())(x[:2], y)


def test_fab_has_no_l1(x: Tensor) -> None:
    with pytest.raises(UnboundLocalError):
        torchattacks.FAB(linear(), norm="L1", n_classes=5)(x[:2], predict(linear(), x[:2]))


@pytest.mark.parametrize("name", ["TIFGSM", "PIFGSM", "PIFGSMPP"])
def test_some_know_three_channels_only(name: str, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        getattr(torchattacks, name)(linear())(x, predict(linear(), x))


def test_apgd_keeps_its_graph_and_reseeds_and_ours_does_not(x: Tensor) -> None:
    model = linear()
    y = predict(model, x)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    theirs = torchattacks.APGD(model, steps=5)(x, y)
    assert theirs.requires_grad or theirs.grad_fn is not None
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    threat = ThreatModel(norm="linf", epsilon=0.1)
    ours = TorchAttacks(name="APGD", kwargs={"steps": 5})(model, x, y, threat)
    assert not ours.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["FAB", "EADL1"])
def test_parameter_gradients_stay_with_them_and_not_with_us(name: str, x: Tensor) -> None:
    model = linear()
    y = predict(model, x)
    threat = ThreatModel(norm="l1" if name == "EADL1" else "l2", epsilon=1)
    TorchAttacks(name=name)(model, x[:4], y[:4], threat)
    assert model.weight.grad is None
    getattr(torchattacks, name)(model)(x[:4], y[:4])
    assert model.weight.grad is not None


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.last = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1))


@pytest.mark.parametrize("name", ["HopSkipJump", "BoundaryAttack"])
def test_art_promotes_to_float64_under_numpy_2(name: str, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        generate(
            name, Network(), x[:4], predict(Network(), x[:4]),
            cast=False, max_iter=3, targeted=False, verbose=False,
        )  # fmt: skip


def test_boundary_and_sign_opt_are_targeted_by_default() -> None:
    classifier = PyTorchClassifier(linear(), nn.CrossEntropyLoss(), SHAPE, 5, device_type="cpu")
    for name in ("BoundaryAttack", "SignOPTAttack"):
        assert getattr(evasion, name)(classifier).targeted
        built = ART(name=name).arguments(ThreatModel(norm="l2", epsilon=1), 5)
        assert built["targeted"] is False


def test_hop_skip_jump_draws_from_the_clock(x: Tensor) -> None:
    model = linear()
    y = predict(model, x)
    results = []
    for _ in range(2):
        np.random.seed(0)
        results.append(
            generate("HopSkipJump", model, x[:3], y[:3], max_iter=1, init_eval=5, verbose=False)
        )
    assert not torch.equal(*results)


@pytest.mark.slow
def test_pixel_attack_brings_untouched_pixels_back_changed(x: Tensor) -> None:
    """And ours brings back no more changed pixels than were allowed."""
    model = linear()
    y = predict(model, x)
    np.random.seed(0)
    x, y = x[:10], y[:10]
    theirs = generate("PixelAttack", model, x, y, th=2, max_iter=5)
    changed = (theirs - x).abs()
    assert (changed > 0).flatten(1).sum(1).max() > 2 >= (changed > 1e-6).flatten(1).sum(1).max()
    threat = ThreatModel(norm="l0", epsilon=2)
    ours = ART(name="PixelAttack", kwargs={"max_iter": 5})(model, x, y, threat)
    threat.check(ours, x)
    assert accuracy(model, ours, y) < 0.9


@pytest.mark.slow
def test_threshold_attack_leaves_its_budget(x: Tensor) -> None:
    model, found = linear(), []
    y = predict(model, x)
    for epsilon in (5 / 255, 0.05):
        adv = generate("ThresholdAttack", model, x[:6], y[:6], th=255 * epsilon, es=1, max_iter=3)
        found.append(float((adv - x[:6]).abs().max()) / epsilon)
    assert max(found) > 1 + 1e-4


def test_geoda_needs_what_numpy_2_has_not(
    x: Tensor, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it writes into the working directory
    with pytest.raises(AttributeError, match=r"np\.mat"):
        generate("GeoDA", linear(), x[:1], predict(linear(), x[:1]), sub_dim=4, verbose=False)


def test_spatial_transformation_is_not_of_our_grid(x: Tensor) -> None:
    model = linear()
    adv = generate(
        "SpatialTransformation", model, x[:4], predict(model, x[:4]),
        max_translation=20, num_translations=3, max_rotation=30, num_rotations=5, verbose=False,
    )  # fmt: skip
    assert torch.isinf(spatial.size(adv.float(), x[:4])).all()


def test_autoattack_of_art_is_another_mix(x: Tensor) -> None:
    names = evasion.AutoAttack.__init__.__doc__ or ""
    module = __import__("inspect").getsource(evasion.AutoAttack)
    assert "DeepFool(" in module
    assert "FAB" not in names + module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ProjectedGradientDescent", "AutoProjectedGradientDescent"])
def test_l1_of_art_is_weak(name: str, x: Tensor) -> None:
    model = linear()
    y = predict(model, x)
    few = {"nb_random_init": 1} if name.startswith("Auto") else {}
    theirs = generate(
        name, model, x, y, norm=1, eps=1.5, eps_step=0.5, max_iter=60, verbose=False, **few
    )
    ours = PGD(loss="margin")(model, x, y, ThreatModel(norm="l1", epsilon=1.5))
    assert accuracy(model, theirs, y) >= accuracy(model, ours, y) + 0.1


def test_square_l2_of_art_is_weak() -> None:
    """It divides where the paper multiplies, so its windows do not have the length they should."""
    source = __import__("inspect").getsource(evasion.SquareAttack.generate)
    assert "delta_new /= np.sqrt(np.sum(delta_new**2, axis=(2, 3), keepdims=True)) * np.sqrt(" in (
        source
    )


@pytest.mark.slow
def test_carlini_l0_changes_most_pixels(inner: Tensor) -> None:
    model = linear()
    y = predict(model, inner[:2])
    adv = generate("CarliniL0Method", model, inner[:2], y, max_iter=10, batch_size=2, verbose=False)
    assert ((adv - inner[:2]).abs() > 1e-5).flatten(1).sum(1).min() > 32
    few = TorchAttacks(name="SparseFool")(model, inner[:2], y, ThreatModel(norm="l0", epsilon=4))
    assert accuracy(model, few, y) == 0


def test_the_attack_inside_targeted_universal_does_not_aim(x: Tensor) -> None:
    model = linear()
    targets = (predict(model, x) + 1) % 5
    classifier = PyTorchClassifier(
        Castable(model), nn.CrossEntropyLoss(), SHAPE, 5, clip_values=(0.0, 1.0), device_type="cpu"
    )
    inside = evasion.TargetedUniversalPerturbation(classifier)._get_attack("fgsm", None)
    assert not inside.targeted
    adv = torch.from_numpy(inside.generate(x.numpy(), y=np.eye(5)[targets]))
    assert float((predict(model, adv) == targets).double().mean()) < 0.3


@pytest.mark.slow
def test_the_differences_of_virtual_adversarial_drown_in_float32(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:20] for part in digit_images)
    threat = ThreatModel(norm="l2", epsilon=3)
    left = [
        accuracy(
            digit_model,
            ART(
                name="VirtualAdversarialMethod",
                kwargs={"max_iter": 1, "finite_diff": finite_diff},
            )(digit_model, x, y, threat),
            y,
        )
        for finite_diff in (1e-6, 1e-2)
    ]
    assert left[0] >= left[1] + 0.1

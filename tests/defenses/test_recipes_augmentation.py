"""Augmentation: each operation against another library or a closed form."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from torch import nn
from torchvision.transforms import functional as vision

from robustbench_local.defenses import AugmentedTraining, Mixing, mixing
from robustbench_local.defenses.augmentation import cover, jensen_shannon
from robustbench_local.errors import UserError
from robustbench_local.training.step import Step


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int, n: int = 5, height: int = 20, width: int = 15) -> torch.Tensor:
    """Smooth pictures of 8-bit values that do not fill the range."""
    rough = torch.rand(n, channels, 6, 5, generator=generator(3))
    smooth = F.interpolate(rough, (height, width), mode="bilinear") * 0.7 + 0.1
    return (smooth * 255).round() / 255


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return (x * 255).round().to(torch.uint8)


ONE = torch.ones(5)


@pytest.mark.parametrize("channels", [1, 3])
def test_changes_of_colour_are_those_of_torchvision(channels):
    x, level = pictures(channels), torch.tensor([0.05, 0.2, 0.3, 0.55, 1.0])
    whole = as_bytes(x)
    found = mixing.equalize(x, level, ONE)
    assert torch.equal(as_bytes(found), vision.equalize(whole))
    found = mixing.autocontrast(x, level, ONE)
    assert (found - vision.autocontrast(whole).double() / 255).abs().max() < 1.01 / 255
    found = as_bytes(mixing.posterize(x, level, ONE))
    for number, bits in enumerate([4, 4, 3, 2]):  # 4 - int(4 * level)
        assert torch.equal(found[number], vision.posterize(whole[number], bits))
    assert found[4].max() == 0
    found = as_bytes(mixing.solarize(x, level, ONE))
    for number, share in enumerate(level):
        threshold = 256 - int(256 * share)
        assert torch.equal(found[number], vision.solarize(whole[number], threshold))


def test_images_of_one_colour_stay_whole():
    x = torch.full((2, 3, 4, 4), 0.4)
    level = torch.full((2,), 0.3)
    for operation in (mixing.autocontrast, mixing.equalize):
        assert torch.allclose(operation(x, level, ONE[:2]), x, atol=1e-3)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_geometry_is_that_of_torchvision_up_to_the_direction(channels, sign):
    x = pictures(channels)
    level, signs = torch.full((5,), 0.5), torch.full((5,), sign)

    def affine(angle=0.0, translate=(0, 0), shear=(0.0, 0.0)):
        return vision.affine(
            x, angle, list(translate), 1.0, list(shear), vision.InterpolationMode.BILINEAR
        )

    shear = math.degrees(math.atan(0.15))
    expected = {
        mixing.rotate: affine(angle=-15.0 * sign),
        mixing.shear_x: affine(shear=(shear * sign, 0.0)),
        mixing.shear_y: affine(shear=(0.0, shear * sign)),
    }
    for operation, theirs in expected.items():
        mine = operation(x, level, signs)
        assert (mine - x).abs().max() > 0.05  # it does something
        difference = (mine - theirs)[:, :, 2:-2, 2:-2].abs()
        assert difference.max() < 0.02, operation.__name__


@pytest.mark.parametrize("sign", [-1, 1])
def test_translations_move_by_a_third_of_a_side_at_most(sign):
    x = torch.rand(4, 3, 12, 9, generator=generator())
    level, signs = torch.tensor([0.25, 0.5, 0.75, 1.0]), torch.full((4,), sign)
    down = mixing.translate_y(x, level, signs)
    for number in range(4):
        moved = number + 1  # of 12 rows
        kept = down[number, :, : 12 - moved] if sign > 0 else down[number, :, moved:]
        source = x[number, :, moved:] if sign > 0 else x[number, :, : 12 - moved]
        assert torch.allclose(kept, source, atol=1e-5)
        empty = down[number, :, 12 - moved :] if sign > 0 else down[number, :, :moved]
        assert empty.abs().max() < 1e-5
    across = mixing.translate_x(x, torch.full((4,), 1.0), signs)  # 3 of 9 columns
    kept, source = (across[..., :6], x[..., 3:]) if sign > 0 else (across[..., 3:], x[..., :6])
    assert torch.allclose(kept, source, atol=1e-5)


def test_rotation_keeps_shapes_in_images_that_are_not_square():
    x = torch.zeros(1, 1, 41, 21)
    x[0, 0, 5:36, 10] = 1  # an upright line of length 31
    turned = mixing.rotate(x, torch.ones(1), torch.ones(1))[0, 0]
    rows, columns = (turned > 0.4).nonzero().double().T
    slope, _ = np.polyfit(rows, columns, 1)
    assert abs(math.degrees(math.atan(slope))) == pytest.approx(30, abs=3)


@pytest.mark.parametrize("channels", [1, 3])
def test_mixtures_are_images_of_the_seed(channels):
    x = pictures(channels, n=40)
    mix = Mixing(chains=3, depth=3, severity=5.0)
    found = mix(x, generator(1))
    assert found.shape == x.shape and found.dtype == x.dtype
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(found, mix(x, generator(1)))
    assert not torch.equal(found, mix(x, generator(2)))
    assert ((found - x).abs().flatten(1).amax(1) > 0.01).double().mean() > 0.9


def test_the_weights_of_mixtures_are_those_of_the_paper(monkeypatch):
    """Operations that make every image white: what is left of a black one is 1 - Beta(1, 1)."""
    monkeypatch.setattr(mixing, "OPERATIONS", (lambda x, level, sign: torch.ones_like(x),))
    black = torch.zeros(4000, 1, 2, 2)
    found = Mixing(chains=3, depth=1)(black, generator())
    assert torch.equal(found, found[:, :, :1, :1].expand_as(found))
    white = found[:, 0, 0, 0].sort().values
    uniform = (torch.arange(4000) + 0.5) / 4000
    assert (white - uniform).abs().max() < 0.03  # Kolmogorov and Smirnov: 0.03 once in 600
    # Whatever the weights, they sum to 1.
    monkeypatch.setattr(mixing, "OPERATIONS", (lambda x, level, sign: x,))
    x = pictures(3)
    assert torch.allclose(Mixing()(x, generator()), x, atol=1e-6)
    # Half of the operations leave it: three chains then weigh 0, 1 or Dirichlet shares of it.
    monkeypatch.setattr(
        mixing, "OPERATIONS", (lambda x, *_: torch.ones_like(x), lambda x, *_: torch.zeros_like(x))
    )
    found = Mixing(chains=3, depth=1)(black, generator())[:, 0, 0, 0]
    assert found.mean() == pytest.approx(0.25, abs=0.015)
    # E[u^2] E[(sum of shares)^2] with u uniform: 1/3 (3 * 1/6 * 1/2 + 6 * 1/12 * 1/4) = 1/8
    assert found.square().mean() == pytest.approx(0.125, abs=0.01)


def test_chains_have_one_to_depth_operations(monkeypatch):
    monkeypatch.setattr(mixing, "OPERATIONS", (lambda x, *_: x + 0.25,))
    lengths = []
    original = torch.where

    def spy(condition, *rest):
        if condition.shape == (3000, 1, 1, 1):
            lengths.append(condition.flatten())
        return original(condition, *rest)

    monkeypatch.setattr(torch, "where", spy)
    Mixing(chains=1, depth=3)(torch.zeros(3000, 1, 1, 1), generator())
    counts = torch.stack(lengths).sum(0).bincount(minlength=4)
    assert counts[0] == 0 and all(900 < count < 1100 for count in counts[1:])


def test_levels_grow_with_severity(monkeypatch):
    seen = []
    monkeypatch.setattr(
        mixing, "OPERATIONS", (lambda x, level, sign: (seen.append((level, sign)), x)[1],)
    )
    Mixing(chains=2, depth=2, severity=4.0)(torch.zeros(2000, 1, 1, 1), generator())
    levels = torch.cat([level for level, _ in seen])
    assert 0.01 <= levels.min() < 0.012 and 0.398 < levels.max() <= 0.4
    signs = torch.cat([sign for _, sign in seen])
    assert set(signs.tolist()) == {-1, 1} and signs.double().mean().abs() < 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_cutout_is_one_square_in_the_mean_colour(channels):
    x = torch.rand(3000, channels, 12, 8, generator=generator())
    found = cover(x, 0.5, generator(1))  # 4 of 8 pixels
    mean = x.mean((0, 2, 3))
    covered = (found == mean.view(1, -1, 1, 1)).all(1)
    assert torch.equal(torch.where(covered[:, None], x, found), x)
    rows, columns = covered.any(2).sum(1), covered.any(1).sum(1)
    assert torch.equal(covered.sum((1, 2)), rows * columns)
    assert rows.max() == columns.max() == 4 and rows.min() == columns.min() == 2
    # The centre is anywhere: so many of 12 centres cover each row.
    inside = covered.any(2).double().mean(0)
    expected = torch.tensor([3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 2]).double() / 12
    assert (inside - expected).abs().max() < 0.04


def test_noise_has_the_deviation_asked_for_and_stays_in_the_box():
    recipe = AugmentedTraining(noise=0.1)
    grey = torch.full((20, 3, 20, 20), 0.5)
    found = recipe.augment(grey, generator())
    assert (found - grey).std() == pytest.approx(0.1, abs=0.002)
    black = recipe.augment(torch.zeros(20, 1, 20, 20), generator())
    assert black.min() == 0 and (black == 0).double().mean() == pytest.approx(0.5, abs=0.02)


def test_the_divergence_of_three_predictions():
    logits = torch.randn(3, 6, 4, generator=generator()).double() * 3
    p = logits.softmax(2).numpy()
    middle = p.mean(0)
    expected = np.mean([(q * np.log(q / middle)).sum(1).mean() for q in p])
    assert jensen_shannon(*logits).item() == pytest.approx(expected, rel=1e-6)
    two = jensen_shannon(*logits[:2]).item()
    assert two == pytest.approx(np.mean(jensenshannon(p[0], p[1], axis=1) ** 2), rel=1e-6)
    assert jensen_shannon(logits[0], logits[0]).item() == pytest.approx(0, abs=1e-12)
    assert jensen_shannon(logits[0] * 1000, logits[1] * 1000).isfinite()


@pytest.mark.parametrize("channels", [1, 3])
def test_consistency_adds_the_divergence_between_three_views(channels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 300, 4))
    x, y = pictures(channels), torch.arange(5) % 4

    def loss(recipe, number=1):
        return recipe.loss(
            model, Step(x, y, criterion=F.cross_entropy, progress=0.5, number=number, seed=0)
        )

    seen = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found, logits = loss(AugmentedTraining(noise=0.2, consistency=3.0))
    hook.remove()
    (views,) = seen
    clean, first, second = views.chunk(3)
    assert torch.equal(clean, x) and not torch.equal(first, second)
    assert torch.allclose(logits, model(x))
    apart = jensen_shannon(model(x), model(first), model(second))
    assert torch.allclose(found, F.cross_entropy(model(x), y) + 3 * apart, atol=1e-6)
    plain, logits = loss(AugmentedTraining(noise=0.2))
    assert torch.allclose(plain, F.cross_entropy(model(first), y), atol=1e-5)
    assert torch.allclose(logits, model(first), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "which leaves images as they are"),
        ({"noise": -0.1}, r"noise=-0\.1; expected a number from 0 to 1"),
        ({"cutout": 1.5}, r"cutout=1\.5; expected a number from 0 to 1"),
        ({"noise": 0.1, "consistency": -1.0}, "consistency=-1"),
    ],
)
def test_wrong_settings_are_told(settings, told):
    with pytest.raises(UserError, match=told):
        AugmentedTraining(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"chains": 0}, r"mixing\.chains=0"), ({"depth": 1.5}, r"mixing\.depth=1\.5"),
     ({"severity": 11.0}, r"mixing\.severity=11")],
)  # fmt: skip
def test_wrong_settings_of_mixing_are_told(settings, told):
    with pytest.raises(UserError, match=told):
        Mixing(**settings)

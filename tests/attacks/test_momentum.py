"""Momentum, input diversity and smoothing, each against another implementation of it."""

from itertools import product

import numpy as np
import pytest
import torch
import torchattacks
from conftest import Double, LinearVictim, Recording, accuracy
from scipy.signal import convolve2d
from scipy.stats import norm as gauss
from torch import Tensor, nn
from torch.nn import functional

from robustbench_local.attacks import PGD, Momentum
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel

LINF = ThreatModel(norm="linf", epsilon=0.125)


def linear(shape: tuple[int, int, int], classes: int = 3) -> LinearVictim:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(classes, int(np.prod(shape)), generator=generator)
    return LinearVictim(weight, torch.zeros(classes))


def images(shape: tuple[int, int, int], count: int = 6) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_plain_steps_are_those_of_torchattacks(
    decay: float, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    model = Double(digit_model).eval()
    x, y = (digit_images[0][:64] * 255).round() / 256, digit_images[1][:64]
    theirs = torchattacks.MIFGSM(model, eps=0.125, alpha=1 / 64, steps=12, decay=decay)(x, y)
    mine = Momentum(steps=12, step_size=1 / 8, decay=decay)(model, x, y, LINF)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert accuracy(model, mine, y) < 0.9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_full_step_is_fgsm(
    norm: str, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:32] for part in digit_images)
    threat = ThreatModel(norm=norm, epsilon=0.2)
    fgsm = PGD(steps=1, step_size=1, random_start=False, early_stop=False, best_iterate=False)
    mine = Momentum(steps=1, step_size=1)(digit_model, x, y, threat)
    torch.testing.assert_close(mine, fgsm(digit_model, x, y, threat), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 10, 10), (3, 10, 8)])
def test_every_image_is_shrunk_and_padded_by_itself(shape: tuple[int, int, int]) -> None:
    x = images(shape, 40)
    victim = Recording(linear(shape))
    attack = Momentum(steps=1, diversity_probability=1, diversity_scale=0.7)
    attack(victim, x, torch.zeros(40, dtype=torch.int64), LINF)
    (seen,) = victim.seen
    sides = [range(int(0.7 * side), side + 1) for side in shape[1:]]
    used = set()
    for image, shown in zip(x, seen, strict=True):
        for size in product(*sides):
            small = functional.interpolate(image[None], size=size, mode="bilinear")
            for top, left in product(range(shape[1] - size[0] + 1), range(shape[2] - size[1] + 1)):
                edges = (left, shape[2] - size[1] - left, top, shape[1] - size[0] - top)
                if torch.allclose(functional.pad(small, edges)[0], shown, atol=1e-5):
                    used.add((size, top, left))
                    break
            else:
                continue
            break
        else:
            pytest.fail("an image that is no shrunk and padded one was shown")
    assert len(used) > 15
    assert len({size for size, _, _ in used}) > 3


def test_diversity_happens_as_often_as_asked_for() -> None:
    shape = (1, 12, 12)
    x = images(shape, 400)
    shares = []
    for probability in (0.0, 0.3, 1.0):
        victim = Recording(linear(shape))
        attack = Momentum(steps=1, diversity_probability=probability, diversity_scale=0.5)
        attack(victim, x, torch.zeros(400, dtype=torch.int64), LINF)
        same = torch.isclose(victim.seen[0], x, atol=1e-6).flatten(1).all(1)
        shares.append(1 - float(same.double().mean()))
    # Of the 7 sizes one is the whole image.
    assert shares == pytest.approx([0, 0.3 * 6 / 7, 6 / 7], abs=0.08)


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 12, 10)])
@pytest.mark.parametrize("size", [3, 7])
def test_the_gradient_is_smoothed(shape: tuple[int, int, int], size: int) -> None:
    """On two classes the gradient is the difference of the weights, wherever it is taken."""
    victim, x = linear(shape, 2), images(shape)
    x = 0.3 + 0.4 * x
    line = gauss.pdf(np.linspace(-3, 3, size))
    kernel = np.outer(line, line)
    slope = (victim.weight[1] - victim.weight[0]).detach().numpy().reshape(shape)
    expected = np.stack([convolve2d(part, kernel, mode="same") for part in slope])
    threat = ThreatModel(norm="l2", epsilon=0.2)
    attack = Momentum(steps=1, step_size=1, kernel_size=size)
    delta = (attack(victim, x, torch.zeros(6, dtype=torch.int64), threat) - x).numpy()
    expected = 0.2 * expected / np.linalg.norm(expected)
    np.testing.assert_allclose(delta, np.broadcast_to(expected, delta.shape), atol=1e-6)


def test_noisy_copies_are_as_noisy_as_asked_for() -> None:
    shape = (1, 12, 12)
    x, victim = images(shape, 50), Recording(linear((1, 12, 12)))
    attack = Momentum(steps=2, samples=3, noise=0.25)
    attack(victim, x, torch.zeros(50, dtype=torch.int64), LINF)
    assert len(victim.seen) == 6
    noise = torch.stack([seen - x for seen in victim.seen[:3]])
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert abs(float((noise[0] * noise[1]).mean())) < 0.002


def test_reaches_a_target(digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:100] for part in digit_images)
    threat = ThreatModel(norm="linf", epsilon=0.3)
    x_adv = Momentum(target="next")(digit_model, x, y, threat)
    assert accuracy(digit_model, x_adv, (y + 1) % 10) > 0.75


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("steps", "samples") for value in (0, -1, 2.5, True)],
        *[("kernel_size", value) for value in (0, 2, 3.0)],
        *[("step_size", value) for value in (0, -1, float("nan"))],
        *[("decay", value) for value in (-0.1, float("nan"), float("inf"))],
        *[("diversity_probability", value) for value in (-0.1, 1.1)],
        *[("diversity_scale", value) for value in (0, 1.1)],
        ("noise", -1),
        ("loss", "hinge"),
        ("target", -2),
    ],
)
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"attack\.{name}={value}"):
        Momentum(**{name: value})


def test_averaging_without_noise_is_refused() -> None:
    with pytest.raises(UserError, match=r"attack\.samples=4 .* attack\.noise"):
        Momentum(samples=4)

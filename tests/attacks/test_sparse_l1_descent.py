"""Sparse l1 descent against the formula by hand, a closed form, and plain l1 descent."""

import numpy as np
import pytest
import torch
from conftest import LinearVictim, LogSoftmax
from torch import Tensor, nn
from torch.nn import functional

from robustbench_local.attacks import PGD, SparseL1Descent
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel

PLAIN = {"early_stop": False, "best_iterate": False}


def by_hand(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, steps: int) -> Tensor:
    """Equal steps along the entries above the 99th percentile, projection on the simplex."""
    x_adv = x.double()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x_adv), y), x_adv)
        moved = []
        for row, g, start in zip(x_adv.detach().numpy(), gradient.numpy(), x.numpy(), strict=True):
            chosen = np.abs(g) >= np.percentile(np.abs(g), 99)
            delta = row + 0.1 * epsilon * np.sign(g) * chosen / chosen.sum() - start
            if np.abs(delta).sum() > epsilon:
                falling = np.sort(np.abs(delta).ravel())[::-1]
                excess = (np.cumsum(falling) - epsilon) / np.arange(1, falling.size + 1)
                cut = excess[np.flatnonzero(falling > excess)[-1]]
                delta = np.sign(delta) * np.maximum(np.abs(delta) - cut, 0)
            moved.append(np.clip(start + delta, 0, 1))
        x_adv = torch.from_numpy(np.stack(moved)).double()
    return x_adv.float()


class Curved(nn.Module):
    """A smooth victim in float64 whose gradient turns as the image changes."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.first = torch.randn(entries, 20, generator=generator, dtype=torch.float64)
        self.second = torch.randn(20, 5, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x.double().flatten(1) @ self.first / 4) @ self.second).to(x.dtype)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 12)], ids=str)
@pytest.mark.parametrize("steps", [1, 9, 30])
def test_is_the_formula_where_no_pixel_meets_the_box(
    shape: tuple[int, int, int], steps: int
) -> None:
    x = 0.4 + 0.2 * torch.rand(12, *shape, generator=torch.Generator().manual_seed(0))
    model = Curved(x[0].numel())
    with torch.no_grad():
        y = model(x).argmax(1)
    threat = ThreatModel(norm="l1", epsilon=0.8)
    x_adv = SparseL1Descent(steps=steps, **PLAIN)(model, x, y, threat)
    expected = by_hand(model, x, y, epsilon=0.8, steps=steps)
    assert (x_adv - x).abs().max() < 0.4
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-5)


def saturated(count: int) -> Tensor:
    """Images of which a third of the pixels is exactly 0, a third exactly 1."""
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.rand(count, 1, 14, 14, generator=generator) - 1).clamp(0, 1)


def linear(classes: int) -> LinearVictim:
    weight = torch.randn(classes, 196, generator=torch.Generator().manual_seed(5))
    return LinearVictim(weight, -weight.sum(1) / 2)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def best_rise(slope: np.ndarray, x: np.ndarray, epsilon: float) -> np.ndarray:
    """The exact optimum under l1 and the box: the steepest pixels are filled first."""
    room = np.where(slope > 0, 1 - x, x)
    order = np.argsort(-np.abs(slope))
    filled = np.minimum(np.cumsum(room[:, order], axis=1), epsilon)
    return np.diff(filled, axis=1, prepend=0) @ np.abs(slope)[order]


@pytest.mark.parametrize(("epsilon", "share"), [(1.0, 0.9), (5.0, 0.99)])
def test_climbs_to_the_optimum_of_a_linear_victim(epsilon: float, share: float) -> None:
    """Saturated pixels and all; equal shares alone stop a little short where few pixels count."""
    model, x = linear(2), saturated(100)
    y = predict(model, x)
    threat = ThreatModel(norm="l1", epsilon=epsilon)
    x_adv = SparseL1Descent(steps=200, step_size=0.05, **PLAIN)(model, x, y, threat)
    threat.check(x_adv, x)
    weight = model.weight.detach().numpy()
    for true in (0, 1):
        rows = (y == true).numpy()
        slope = weight[1 - true] - weight[true]
        flat, moved = (part.flatten(1).double().numpy()[rows] for part in (x, x_adv))
        possible = best_rise(slope, flat, epsilon)
        reached = (moved - flat) @ slope
        assert (reached <= possible + 1e-4).all()
        assert (reached / possible).min() >= share


@pytest.mark.parametrize("variant", ["shift", "log-softmax"])
def test_no_disguise_of_the_logits_helps(variant: str) -> None:
    plain, x = linear(5), saturated(100)
    y = predict(plain, x)
    disguised = {
        "shift": LinearVictim(plain.weight.data, plain.bias.data, shift=-50),
        "log-softmax": LogSoftmax(plain),
    }[variant]
    threat = ThreatModel(norm="l1", epsilon=1)
    survivors = [
        float((predict(plain, SparseL1Descent()(model, x, y, threat)) == y).double().mean())
        for model in (plain, disguised)
    ]
    assert 0.05 < survivors[0] < 0.95
    assert abs(survivors[1] - survivors[0]) <= 0.01 + 1e-9


def test_the_step_is_sparse_and_the_sparsity_matters() -> None:
    x = 0.4 + 0.2 * torch.rand(6, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    model = Curved(400)
    y = predict(model, x)
    threat = ThreatModel(norm="l1", epsilon=1)
    for sparsity, entries in ((0.99, 4), (0.9, 40), (0.0, 400), (1.0, 1)):
        attack = SparseL1Descent(steps=1, step_size=0.3, sparsity=sparsity, **PLAIN)
        delta = attack(model, x, y, threat) - x
        assert (delta != 0).flatten(1).sum(1).tolist() == [entries] * 6
        torch.testing.assert_close(delta.abs().flatten(1).sum(1), torch.full((6,), 0.3))
        assert (delta[delta != 0].abs() * entries / 0.3 - 1).abs().max() < 1e-3


def test_about_as_strong_as_plain_l1_descent_on_digits(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:200] for part in digit_images)
    threat = ThreatModel(norm="l1", epsilon=8)
    left = [
        float((predict(digit_model, attack(digit_model, x, y, threat)) == y).double().mean())
        for attack in (SparseL1Descent(steps=40), PGD(random_start=False))
    ]
    assert 0.02 < left[0] < 0.9
    assert left[0] <= left[1] + 0.05


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, 99, float("nan"), True])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match=r"attack\.sparsity=.* from 0 to 1"):
        SparseL1Descent(sparsity=sparsity)


def test_what_pgd_refuses_is_refused() -> None:
    with pytest.raises(UserError, match=r"attack\.steps=0"):
        SparseL1Descent(steps=0)
    with pytest.raises(UserError, match=r"serves l1"):
        SparseL1Descent().require(ThreatModel(norm="linf", epsilon=0.1))

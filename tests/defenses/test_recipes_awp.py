"""Adversarial weight perturbation: its direction and size in closed form, and no traces."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustbench_local.attacks import PGD, Attack
from robustbench_local.defenses import AWP, AdversarialTraining, Recipe, Standard
from robustbench_local.defenses.awp import worst_offset
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Step

LINF = ThreatModel(norm="linf", epsilon=0.1)


@dataclass(frozen=True, kw_only=True)
class Quadratic(Recipe):
    """Half the squared distance of the weights from `goal`: images pick them out one by one."""

    adversarial: ClassVar[bool] = False
    goal: float = 2.0

    def loss(self, model, step):
        logits = model(step.x)
        return 0.5 * (logits - self.goal).square().sum(), logits


def step(recipe, model, x, y):
    return recipe.loss(model, Step(x, y, criterion=F.cross_entropy, progress=0.5, number=1, seed=0))


def bare(features: int, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes, bias=False))


def test_a_quadratic_loss_has_a_closed_form():
    """With d = w - goal: v = gamma |w| d / |d|, the loss is (|d| + gamma |w|)^2 / 2."""
    model, unit = bare(6, 4), torch.eye(6).view(6, 1, 2, 3)
    before = model[1].weight.detach().clone()
    loss, _ = step(AWP(gamma=0.2)(Quadratic()), model, unit, torch.zeros(6).long())
    distance, reach = (before - 2).norm(), 0.2 * before.norm()
    assert torch.allclose(loss, (distance + reach) ** 2 / 2)
    loss.backward()
    # The gradient found at w + v, for weights that have not moved.
    expected = (before - 2) * (1 + reach / distance)
    assert torch.allclose(model[1].weight.grad, expected, atol=1e-6)
    assert torch.equal(model[1].weight, before)
    worst = loss.item()
    for _ in range(200):  # nothing else of that size is worse
        other = torch.randn(4, 6)
        moved = before + other * (reach / other.norm())
        assert 0.5 * (moved - 2).square().sum() < worst


def test_a_gradient_that_float16_rounds_to_0_still_moves_the_weights():
    class Half(nn.Module):
        def forward(self, x):
            return x.half().float()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 1))
    x = torch.rand(5, 4)
    exact = worst_offset(model, 1e-8 * model(x).sum(), 0.1)
    model[1] = Half()
    offset = worst_offset(model, 1e-8 * model(x).sum(), 0.1)
    torch.testing.assert_close(offset["0.weight"], exact["0.weight"], rtol=0.05, atol=1e-4)
    assert offset["0.weight"].norm() > 0.09 * model[0].weight.norm()
    beyond = worst_offset(model, 1e3 * model(x).sum(), 0.1)  # infinite in float16
    assert all(each.isfinite().all() for each in beyond.values())


def test_each_layer_moves_by_its_own_size_and_only_matrices_move():
    class Spy(nn.Sequential):
        def forward(self, x):
            found.append({name: w.detach().clone() for name, w in self.named_parameters()})
            return super().forward(x)

    torch.manual_seed(0)
    found: list[dict[str, torch.Tensor]] = []
    model = Spy(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.rand(8, 3, 6, 6), torch.arange(8) % 3
    step(AWP(gamma=0.05)(Standard()), model, x, y)
    plain, moved = found
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for (name, weight), gradient in zip(plain.items(), gradients, strict=True):
        offset = moved[name] - weight
        if name in ("0.weight", "4.weight"):
            assert offset.norm() / weight.norm() == pytest.approx(0.05, rel=1e-3)
            cosine = F.cosine_similarity(offset.flatten(), gradient.flatten(), dim=0)
            assert cosine == pytest.approx(1, abs=1e-4)
        else:
            assert torch.equal(offset, torch.zeros_like(offset))


def test_the_weights_get_the_gradient_found_at_the_perturbed_ones():
    """Against doing it by hand: move a copy, go backward there, carry the gradients back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 3
    weights = list(model.parameters())
    first = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    step(AWP(gamma=0.1)(Standard()), model, x, y)[0].backward()
    mine = [weight.grad.clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, first, strict=True):
            if weight.dim() > 1:
                weight += 0.1 * weight.norm() * gradient / gradient.norm()
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    for one, other in zip(mine, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_batch_statistics_are_those_of_one_pass_at_the_weights_themselves():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))

    x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 3
    plain, perturbed = network(), network()
    step(Standard(), plain, x, y)
    loss, _ = step(AWP(gamma=0.3)(Standard()), perturbed, x, y)
    loss.backward()
    for (name, one), other in zip(plain.named_buffers(), perturbed.buffers(), strict=True):
        assert torch.equal(one, other), name
    assert perturbed[1].num_batches_tracked == 1


CALLS: list[int] = []


@dataclass(frozen=True, kw_only=True)
class Counting(Attack):
    needs: ClassVar = "labels"
    norms: ClassVar = frozenset({"linf"})

    def run(self, model, x, y, threat):
        CALLS.append(self.seed)
        return (x + threat.epsilon).clamp(0, 1)


def test_both_passes_see_the_same_perturbed_images():
    CALLS.clear()
    seen = []
    model = bare(36, 3)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 3
    recipe = AWP(gamma=0.1)(AdversarialTraining(attack=Counting(), threat=LINF, epsilon_ramp=0.0))
    step(recipe, model, x, y)
    assert len(CALLS) == 1 and len(seen) == 2 and torch.equal(*seen)
    assert torch.allclose(seen[0], (x + 0.1).clamp(0, 1))


def test_it_says_what_the_recipe_below_says():
    below = AdversarialTraining(attack=PGD(), threat=LINF, epsilon_ramp=0.3)
    above = AWP(gamma=0.1)(below)
    assert above.adversarial and above.validation_attack() == below.validation_attack()
    assert [above.settled(p) for p in (0.29, 0.3)] == [False, True]
    plain = AWP(gamma=0.1)(Standard())
    assert not plain.adversarial and plain.validation_attack() is None and plain.replays == 1


def test_frozen_and_unused_weights_stay():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = bare(36, 3).requires_grad_(False)
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(self.frozen(x))

    model, x, y = Partly(), torch.rand(8, 1, 6, 6), torch.arange(8) % 3
    loss, _ = step(AWP(gamma=0.1)(Standard()), model, x, y)
    assert loss > F.cross_entropy(model(x), y)
    loss.backward()
    assert model.frozen[1].weight.grad is None and model.unused.weight.grad is None
    assert model.used.weight.grad is not None


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, float("nan")])
def test_gamma_is_a_fraction(gamma):
    with pytest.raises(UserError, match=r"gamma=.*type defense\.regularize\.awp\.gamma=0\.005"):
        AWP(gamma=gamma)

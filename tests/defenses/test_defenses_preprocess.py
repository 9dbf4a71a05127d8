import copy

import pytest
import torch
from torch import nn

from robustbench_local.defenses import Defense, Preprocess, Standard, Wrapped
from robustbench_local.errors import UserError


class Round(Preprocess):
    """Flat steps: its own gradient is 0."""

    def transform(self, x):
        return (x * 7).round() / 7


class Doubling(Round):
    def surrogate(self, x):
        return 2 * x + 0.1


class Shrink(Preprocess):
    def transform(self, x):
        return x[:, :, ::2, ::2].round()

    def surrogate(self, x):
        return nn.functional.avg_pool2d(x, 2)


class Noise(Preprocess):
    randomized = True
    differentiable = True

    def transform(self, x):
        draw = torch.rand(x.shape, generator=self.generator(x.device), device=x.device)
        return x * draw


class Mean(nn.Module):
    def forward(self, x):
        return torch.stack((x.mean((1, 2, 3)), -x.mean((1, 2, 3))), 1)


def test_forward_is_exact_with_and_without_gradients():
    x = torch.rand(3, 1, 8, 8)
    for module in (Round(), Doubling()):
        expected = (x * 7).round() / 7
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x.clone().requires_grad_()), expected)


def test_backward_is_the_surrogates():
    x = torch.rand(3, 1, 8, 8, requires_grad=True)
    weight = torch.rand(3, 1, 8, 8)
    (gradient,) = torch.autograd.grad((Round()(x) * weight).sum(), x)
    assert torch.equal(gradient, weight)
    (gradient,) = torch.autograd.grad((Doubling()(x) * weight).sum(), x)
    assert torch.equal(gradient, 2 * weight)
    (gradient,) = torch.autograd.grad(Shrink()(x).sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, 0.25))


def test_a_differentiable_transform_keeps_its_own_gradient_and_draws_once():
    x = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    out = Noise()(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(gradient * 0.5, out.detach())


def test_a_surrogate_of_another_shape_is_an_error():
    class Wrong(Shrink):
        def surrogate(self, x):
            return x

    with pytest.raises(ValueError, match=r"Wrong\.surrogate"):
        Wrong()(torch.rand(1, 1, 4, 4, requires_grad=True))


def test_draws_come_from_the_modules_own_generator():
    module, x = Noise(), torch.ones(1, 1, 4, 4)
    state = torch.get_rng_state()
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    module.reseed(0)
    assert torch.equal(module(x), first)
    module.reseed(1)
    assert not torch.equal(module(x), first)
    assert torch.equal(state, torch.get_rng_state())


def test_a_copy_goes_on_alone():
    module, x = Noise(), torch.ones(1, 1, 4, 4)
    module(x)
    other = copy.deepcopy(module)
    assert torch.equal(module(x), other(x))


def test_the_first_wrap_named_is_applied_first():
    class Half(Preprocess):
        def transform(self, x):
            return x / 2

    class Minus(Preprocess):
        def transform(self, x):
            return x - 0.25

    victim = Defense(wrap={"half": Half(), "minus": Minus()}).apply(Mean())
    assert victim(torch.ones(1, 1, 2, 2))[0, 0].item() == 0.25  # 1/2 - 1/4
    victim = Defense(wrap={"minus": Minus(), "half": Half()}).apply(Mean())
    assert victim(torch.ones(1, 1, 2, 2))[0, 0].item() == 0.375  # (1 - 1/4) / 2


def test_a_wrap_may_be_any_function_of_a_model():
    model = Mean()
    defense = Defense(wrap={"both": lambda inner: nn.Sequential(inner, nn.Identity())})
    assert defense.apply(model)[0] is model


def test_names():
    recipe = Standard()
    assert Defense().name == Defense({}, {}).name == "none"
    assert Defense({"at": recipe}, {"jpeg": Round(), "noise": Noise()}).name == "at+jpeg+noise"
    assert Defense({"at": recipe}).training_recipe is recipe
    assert Defense().training_recipe == Standard()
    assert Defense().apply(model := Mean()) is model


def test_two_recipes_are_refused():
    with pytest.raises(UserError, match=r"2 recipes \(at, trades\).*type defense=at"):
        Defense({"at": Standard(), "trades": Standard()})


def test_randomised_parts_are_found_and_reseeded_apart():
    x = torch.ones(1, 1, 4, 4)
    defense = Defense(wrap={"round": Round(), "one": Noise(), "two": Noise()})
    victim = defense.apply(Mean())
    assert defense.randomized(victim)
    assert not Defense(wrap={"round": Round()}).randomized(Wrapped(Round(), Mean()))
    reseed = defense.reseeder(victim)
    reseed(5)
    first = victim(x)
    assert not torch.equal(victim(x), first)
    reseed(5)
    assert torch.equal(victim(x), first)
    one, two = (part for part in victim.modules() if isinstance(part, Noise))
    reseed(5)
    assert not torch.equal(one(x), two(x))


def test_two_victims_share_no_draws():
    x = torch.ones(1, 1, 4, 4)
    defense = Defense(wrap={"noise": Noise()})
    one, two = defense.apply(Mean()), defense.apply(Mean())
    expected = [one(x), one(x)]
    assert torch.equal(two(x), expected[0]) and torch.equal(two(x), expected[1])

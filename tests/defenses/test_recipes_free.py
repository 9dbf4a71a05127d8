"""Free adversarial training: what a step hands on, in closed form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustbench_local.defenses import AWP, FreeAdversarialTraining
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Step

LINF = ThreatModel(norm="linf", epsilon=0.1)


def free(**settings) -> FreeAdversarialTraining:
    return FreeAdversarialTraining(**{"threat": LINF, "epsilon_ramp": 0.0, **settings})


def linear(channels: int = 1):
    """Two classes; the loss of class 0 rises along `sign` everywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 25, 2))
    sign = (model[1].weight[1] - model[1].weight[0]).sign().detach().view(channels, 5, 5)
    return model, sign


def step(recipe, model, x, y, *, progress=0.5, number=0):
    loss, logits = recipe.loss(
        model, Step(x, y, criterion=F.cross_entropy, progress=progress, number=number, seed=0)
    )
    loss.backward()
    return loss, logits


@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_step_is_plain_and_the_next_one_is_fgsm(channels):
    model, sign = linear(channels)
    x, y = 0.3 + 0.4 * torch.rand(4, channels, 5, 5), torch.zeros(4).long()
    recipe = free().begin()
    _, logits = step(recipe, model, x, y)
    assert torch.equal(logits, model(x))
    # The one backward pass also gave the weights theirs.
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for weight, expected in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(weight.grad, expected)
    _, logits = step(recipe, model, x, y)
    assert torch.allclose(logits, model(x + 0.1 * sign), atol=1e-5)


def test_the_perturbation_is_carried_to_another_minibatch_and_back_into_the_budget():
    model, sign = linear()
    x, other = 0.3 + 0.4 * torch.rand(2, 4, 1, 5, 5)
    recipe = free(step_size=0.7).begin()
    zero, one = torch.zeros(4).long(), torch.ones(4).long()
    step(recipe, model, x, zero)  # 0.7 epsilon along the sign
    step(recipe, model, other, zero)  # 1.4, brought back to 1
    _, logits = step(recipe, model, x, one)  # the other class: 0.7 the other way
    assert torch.allclose(logits, model(x + 0.1 * sign), atol=1e-5)
    _, logits = step(recipe, model, x, one)
    assert torch.allclose(logits, model(x + 0.03 * sign), atol=1e-5)


def test_images_stay_in_the_box_and_the_ball_and_the_budget_is_that_of_the_ramp():
    model, _ = linear(3)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    recipe = free(epsilon_ramp=0.5, step_size=3.0).begin()
    x = (torch.rand(4, 3, 5, 5) * 3 - 1).clamp(0, 1)  # many pixels at exactly 0 and 1
    for progress in (0.0, 0.1, 0.25, 0.5, 0.9):
        step(recipe, model, x, torch.zeros(4).long(), progress=progress)
        epsilon = 0.1 * min(1.0, progress / 0.5)
        ThreatModel(norm="linf", epsilon=epsilon).check(seen[-1], x)
    assert torch.equal(seen[0], x)
    assert (seen[-1] - x).abs().max() == pytest.approx(0.1, abs=1e-6)


def test_an_epoch_begins_without_a_perturbation_and_leaves_the_one_before_alone():
    model, sign = linear()
    x, y = 0.3 + 0.4 * torch.rand(4, 1, 5, 5), torch.zeros(4).long()
    first = free().begin()
    step(first, model, x, y)
    second = first.begin()
    assert second == first  # what is carried is no setting
    _, logits = step(second, model, x, y)
    assert torch.equal(logits, model(x))
    _, logits = step(first, model, x, y)
    assert torch.allclose(logits, model(x + 0.1 * sign), atol=1e-5)


def test_under_awp_the_perturbation_moves_once_in_a_step():
    model, sign = linear()
    x, y = 0.3 + 0.4 * torch.rand(4, 1, 5, 5), torch.zeros(4).long()
    recipe = AWP(gamma=0.001)(free(step_size=0.3)).begin()
    assert recipe.replays == 4
    for number in range(3):
        seen = []
        hook = model.register_forward_pre_hook(lambda _, x, to=seen: to.append(x[0].detach()))
        step(recipe, model, x, y)
        hook.remove()
        assert len(seen) == 2 and torch.equal(*seen)  # both passes see the same images
        assert torch.allclose(seen[0], x + 0.03 * number * sign, atol=1e-6)


def test_a_gradient_that_is_no_number_leaves_a_perturbation_that_is_one():
    model, _ = linear()
    x, y = 0.3 + 0.4 * torch.rand(4, 1, 5, 5), torch.zeros(4).long()
    recipe = free().begin()
    loss, _ = recipe.loss(
        model, Step(x, y, criterion=F.cross_entropy, progress=0.5, number=0, seed=0)
    )
    (loss * torch.inf).backward()  # what a scaled loss in float16 may do
    for weight in model.parameters():
        weight.grad = None
    loss, _ = step(recipe, model, x, y)
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"replays": 0}, "replays=0; expected a whole number"),
        ({"replays": 2.5}, r"replays=2\.5; expected a whole number"),
        ({"step_size": 0}, "step_size=0; expected a fraction of epsilon"),
        ({"threat": ThreatModel(norm="l0", epsilon=1)}, "l0"),
    ],
)
def test_wrong_settings_are_told(settings, told):
    with pytest.raises(UserError, match=told):
        free(**settings)

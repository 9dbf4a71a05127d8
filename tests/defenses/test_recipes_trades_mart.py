"""TRADES and MART against their formulas written out, and the attack inside TRADES."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustbench_local.attacks import PGD, Attack
from robustbench_local.defenses import DivergenceAscent, Mart, Trades
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Step

LINF = ThreatModel(norm="linf", epsilon=0.1)


@dataclass(frozen=True, kw_only=True)
class Fixed(Attack):
    """Moves every pixel up by epsilon."""

    needs: ClassVar = "labels"
    norms: ClassVar = frozenset({"linf"})

    def run(self, model, x, y, threat):
        return (x + threat.epsilon).clamp(0, 1)


def make(channels: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 4))
    with torch.no_grad():
        model[3].weight *= 6  # confident enough that some probabilities are small
    return model, torch.rand(8, channels, 6, 6), torch.arange(8) % 4


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same(found, expected, model):
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    pairs = zip(gradients(found, model), gradients(expected, model), strict=True)
    for mine, theirs in pairs:
        assert mine.abs().max() > 1e-6  # the gradient goes there at all
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def step(recipe, model, x, y):
    return recipe.loss(model, Step(x, y, criterion=F.cross_entropy, progress=0.5, number=1, seed=0))


def stepped(recipe, channels):
    """The network, its labels, the loss of a step on `Fixed` images, and both predictions."""
    model, x, y = make(channels)
    found, logits = step(recipe, model, x, y)
    x_adv = (x + 0.1).clamp(0, 1)
    assert torch.equal(logits, model(x_adv))
    return model, y, found, model(x).softmax(1), model(x_adv).softmax(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_trades_is_cross_entropy_and_beta_times_the_divergence(channels):
    recipe = Trades(beta=2.5, attack=Fixed(), threat=LINF, epsilon_ramp=0.0)
    model, y, found, p, q = stepped(recipe, channels)
    expected = torch.zeros(())
    for i in range(8):
        expected = expected - p[i, y[i]].log() / 8
        for k in range(4):
            expected = expected + 2.5 * p[i, k] * (p[i, k] / q[i, k]).log() / 8
    assert_same(found, expected, model)


@pytest.mark.parametrize("channels", [1, 3])
def test_mart_is_the_loss_of_the_paper(channels):
    recipe = Mart(weight=5.0, attack=Fixed(), threat=LINF, epsilon_ramp=0.0)
    model, y, found, p, q = stepped(recipe, channels)
    expected = torch.zeros(())
    for i in range(8):
        wrong = max(q[i, k] for k in range(4) if k != y[i])
        boosted = -q[i, y[i]].log() - (1.0001 - wrong).log()
        apart = sum(p[i, k] * (p[i, k] / q[i, k]).log() for k in range(4))
        expected = expected + (boosted + 5 * apart * (1 - p[i, y[i]])) / 8
    assert_same(found, expected, model)


def test_mart_stays_finite_where_a_wrong_class_is_certain():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with torch.no_grad():
        model[1].bias += torch.tensor([0.0, 200.0, 0.0, 0.0])
    x = torch.rand(4, 1, 6, 6)
    loss, _ = step(Mart(weight=5.0, attack=Fixed(), threat=LINF), model, x, torch.zeros(4).long())
    loss.backward()
    assert loss.isfinite() and all(w.grad.isfinite().all() for w in model.parameters())
    assert loss > 150 - math.log(1e-4) - 10  # about 200 of cross-entropy and -log(1e-4)


def test_the_divergence_is_climbed_to_a_corner_of_the_ball():
    """Two classes and a linear scorer: it is convex in the shift, so a corner is the worst."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2))
    x = 0.3 + 0.4 * torch.rand(20, 3, 4, 4)
    sign = (model[1].weight[1] - model[1].weight[0]).sign().detach().view(3, 4, 4)
    attack = DivergenceAscent(steps=10, step_size=0.5)
    x_adv = attack(model, x, torch.zeros(20).long(), LINF)
    along = (x_adv - x) / 0.1 * sign
    assert torch.allclose(along, along[:, :1, :1, :1].expand_as(along), atol=1e-4)
    assert torch.allclose(along.abs(), torch.ones_like(along), atol=1e-4)
    # No labels are needed, and the draws are those of the seed.
    again = attack(model, x, torch.ones(20).long(), LINF)
    assert torch.equal(x_adv, again)


def test_the_divergence_is_larger_than_after_the_same_steps_of_pgd():
    model, x, y = make(3)
    p = model(x).log_softmax(1)

    def apart(x_adv):
        return F.kl_div(model(x_adv).log_softmax(1), p, reduction="batchmean", log_target=True)

    with torch.no_grad():
        mine = apart(DivergenceAscent(steps=10, step_size=0.25)(model, x, y, LINF))
        pgd = apart(PGD(steps=10, step_size=0.25, early_stop=False)(model, x, y, LINF))
        still = apart(x)
    assert mine >= pgd > still


def test_an_image_does_not_depend_on_how_the_batch_is_cut():
    """Of these sizes a few go through the network at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5), nn.Tanh(), nn.Linear(5, 4))
    x, y = torch.rand(24, 3, 64, 64), torch.arange(24) % 4
    attack = DivergenceAscent(steps=2, step_size=0.5)
    whole = attack(model, x, y, LINF)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], LINF) for i in range(24)])
    assert ((whole - alone).abs() > 1e-3).double().mean() < 0.01  # but for signs of almost 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_divergence_attack_stays_within_any_budget(norm):
    model, x, y = make(1)
    threat = ThreatModel(norm=norm, epsilon={"linf": 0.1, "l2": 0.5, "l1": 2}[norm])
    threat.check(DivergenceAscent(steps=4)(model, x, y, threat), x)


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="beta=0; expected a weight above 0"):
        Trades(beta=0, attack=Fixed(), threat=LINF)
    with pytest.raises(UserError, match="weight=-1; expected 0 or more"):
        Mart(weight=-1, attack=Fixed(), threat=LINF)
    with pytest.raises(UserError, match="steps=0"):
        DivergenceAscent(steps=0)
    with pytest.raises(UserError, match="step_size=nan"):
        DivergenceAscent(step_size=math.nan)
    with pytest.raises(UserError, match="l0"):
        Trades(beta=1.0, attack=DivergenceAscent(), threat=ThreatModel(norm="l0", epsilon=1))

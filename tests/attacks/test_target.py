"""Targeted attacks want one class, the same for an example whatever batch it is in."""

import pytest
import torch
from conftest import LinearVictim

from robustbench_local.attacks import PGD
from robustbench_local.attacks.target import choose_targets
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.evaluation import evaluate
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel

CLASSES = 4


def victim():
    weight = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0))
    return LinearVictim(weight, torch.zeros(CLASSES))


def images(n=200):
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, victim()(x).argmax(1).detach()


def test_next_and_a_class_and_the_least_likely():
    x, y = images()
    model = victim()
    assert torch.equal(choose_targets("next", model, x, y), (y + 1) % CLASSES)
    assert choose_targets(2, model, x, y).tolist() == [2] * len(x)
    assert torch.equal(choose_targets("least_likely", model, x, y), model(x).argmin(1))
    # Never the label itself, also where the label is what the model likes least.
    worst = model(x).argmin(1)
    assert (choose_targets("least_likely", model, x, worst) != worst).all()


def test_random_is_a_wrong_class_evenly_and_belongs_to_the_example():
    x, y = images(3000)
    model = victim()
    targets = choose_targets("random", model, x, y, seed=3)
    assert (targets != y).all()
    offsets = ((targets - y) % CLASSES).bincount(minlength=CLASSES)
    assert offsets[0] == 0
    assert (offsets[1:] / len(x) - 1 / 3).abs().max() < 0.05
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert torch.equal(choose_targets("random", model, x[order], y[order], seed=3), targets[order])
    assert not torch.equal(choose_targets("random", model, x, y, seed=4), targets)


@pytest.mark.parametrize("target", [CLASSES, 99])
def test_a_class_the_model_does_not_have(target):
    x, y = images(3)
    with pytest.raises(UserError, match=rf"attack\.target={target} is out of range.*0 to 3"):
        PGD(target=target)(victim(), x, y, ThreatModel(norm="linf", epsilon=0.1))


@pytest.mark.parametrize("target", ["nearest", -1, 1.5, True])
def test_what_is_no_target(target):
    with pytest.raises(UserError, match=r"attack\.target="):
        PGD(target=target)


def test_dlr_aims_at_no_class():
    with pytest.raises(UserError, match=r"attack\.loss=dlr .*attack\.loss=margin"):
        PGD(target="next", loss="dlr")


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("target", ["random", "least_likely", 1])
def test_pgd_reaches_the_class_where_the_closed_form_says_it_can(target, loss):
    """Two linear scores: the target beats the label at best by moving each pixel to its end."""
    x, y = images()
    model = victim()
    wanted = choose_targets(target, model, x, y, seed=0)
    epsilon = 0.5
    difference = (model.weight[wanted] - model.weight[y]).float()
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    best = torch.where(difference.view_as(x) > 0, high, low)
    reachable = (model(best).argmax(1) == wanted) & (wanted != y)
    attack = PGD(steps=40, step_size=0.1, target=target, loss=loss)
    x_adv = attack(model, x, y, ThreatModel(norm="linf", epsilon=epsilon))
    reached = model(x_adv).argmax(1) == wanted
    assert reachable.sum() > 20
    assert reached[reachable].all()


def test_the_outcome_says_which_class_was_wanted():
    x, y = images()
    split = Split((x * 255).round().to(torch.uint8), y, torch.arange(len(x)))
    oracle = Oracle(victim(), ThreatModel(norm="linf", epsilon=0.3), CLASSES)
    examples = evaluate(oracle, PGD(steps=10, target="next"), split, batch_size=64).examples
    assert examples.target.tolist() == ((y + 1) % CLASSES).tolist()
    plain = evaluate(oracle, PGD(steps=10), split, batch_size=64).examples
    assert set(plain.target.tolist()) == {-1}
    # Any wrong class breaks an image, so a target can only leave more of them.
    assert examples.robust_correct.mean() >= plain.robust_correct.mean()

"""The oracle gives no more than the threat model grants, and counts it."""

from dataclasses import replace

import pytest
import torch
from conftest import LinearVictim
from torch import nn

from robustbench_local.attacks import APGD, PGD, Noise, OnePixel, Square
from robustbench_local.errors import UserError
from robustbench_local.oracle import Oracle, QueryBudgetError, ask, is_settled
from robustbench_local.threat import ThreatModel


@pytest.fixture
def victim():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


X = torch.linspace(0, 1, 80).reshape(5, 1, 4, 4)
Y = torch.tensor([0, 1, 2, 0, 1])


def oracle(victim, access="gradients", **keywords):
    return Oracle(victim, ThreatModel(norm="linf", epsilon=0.1, access=access, **keywords), 3)


def test_gradients_scores_labels(victim):
    x = X.clone().requires_grad_()
    scores = victim(x)
    assert torch.equal(oracle(victim)(x), scores)
    assert oracle(victim)(x).requires_grad
    assert torch.equal(oracle(victim, "scores")(x), scores)
    assert not oracle(victim, "scores")(x).requires_grad
    labels = oracle(victim, "labels")(x)
    assert not labels.requires_grad
    assert labels.sum(1).tolist() == [1.0] * 5
    assert torch.equal(labels.argmax(1), scores.argmax(1))


def test_forward_and_backward_passes_are_counted_per_image(victim):
    watched = oracle(victim)
    x = X.clone().requires_grad_()
    watched(x).sum().backward()
    watched(X[:2])
    assert (watched.forward_passes, watched.backward_passes) == (7, 5)


def test_the_query_budget_is_enforced(victim):
    budgeted = oracle(victim, query_budget=3)
    budgeted.begin(5)
    for _ in range(3):
        budgeted(X)
    with pytest.raises(QueryBudgetError, match=r"query_budget=3"):
        budgeted(X)
    budgeted.begin(5)  # the next batch has its own
    budgeted(X)


def test_a_large_batch_of_candidates_spends_several_queries_of_each_example(victim):
    budgeted = oracle(victim, query_budget=3)
    budgeted.begin(5)
    budgeted(X.repeat(3, 1, 1, 1))
    with pytest.raises(QueryBudgetError):
        budgeted(X[:1])


def test_queries_are_charged_to_their_owners(victim):
    budgeted = oracle(victim, query_budget=4)
    budgeted.begin(5)
    # Twelve questions about three examples, in pieces smaller than the batch of examples.
    owners = torch.tensor([4, 1, 2]).repeat_interleave(4)
    for piece in owners.split(5):
        ask(budgeted, X[piece], piece)
    ask(budgeted, X[:1], torch.tensor([0]))
    assert budgeted.forward_passes == 13
    with pytest.raises(QueryBudgetError, match="forward pass 5 of an example"):
        ask(budgeted, X[:1], torch.tensor([2]))
    assert torch.equal(ask(victim, X, owners), victim(X))


def test_an_allowance_covers_all_images_together(victim):
    watched = oracle(victim, "labels")
    with watched.allowance(7):
        watched(X)
        watched(X[:2])
        with pytest.raises(QueryBudgetError, match=r"attack\.query_budget"):
            watched(X[:1])
    watched(X)  # over with the body
    assert watched.forward_passes == 12


def test_an_attack_that_needs_more_access_is_refused(victim):
    scores = ThreatModel(norm="linf", epsilon=0.1, access="scores")
    with pytest.raises(UserError, match=r"PGD needs access to gradients .* threat.access=scores"):
        PGD()(victim, X, Y, scores)
    assert Noise()(victim, X, Y, scores).shape == X.shape


def test_noise_needs_labels_only(victim):
    labels = ThreatModel(norm="linf", epsilon=0.3, access="labels")
    through = Noise()(Oracle(victim, labels, 3), X, Y, labels)
    assert torch.equal(through, Noise()(victim, X, Y, labels))


@pytest.mark.parametrize(
    ("randomized", "samples", "expected"),
    [(None, 1, True), (None, 2, False), (False, 20, True), (True, 1, False), (True, 20, False)],
)
def test_a_victim_is_settled_where_it_was_seen_to_be(randomized, samples, expected):
    threat = ThreatModel(norm="linf", epsilon=0.1)
    assert is_settled(Oracle(nn.Identity(), threat, 3, randomized=randomized), samples) == expected
    declared = nn.Identity()
    declared.randomized = True
    assert not is_settled(declared, samples)
    assert not is_settled(Oracle(declared, threat, 3, randomized=False), samples)


@pytest.mark.parametrize(
    "attack", [PGD(steps=5), APGD(steps=9), Square(queries=40), OnePixel(population=9)], ids=repr
)
def test_more_looks_than_a_settled_victim_needs_lose_nothing(attack):
    generator = torch.Generator().manual_seed(0)
    victim = LinearVictim(torch.randn(3, 16, generator=generator), torch.zeros(3))
    x = torch.rand(40, 1, 4, 4, generator=generator)
    y = victim(x).argmax(1)
    norm, epsilon = ("l0", 1) if isinstance(attack, OnePixel) else ("linf", 0.08)
    threat = ThreatModel(norm=norm, epsilon=epsilon)
    oracle = Oracle(victim, threat, 3, randomized=False)
    often = replace(attack, eot_samples=3)
    if isinstance(attack, Square):  # its queries are counted
        often = replace(often, queries=3 * attack.queries)
    once, thrice = (victim(a(oracle, x, y, threat)).argmax(1) != y for a in (attack, often))
    assert 0 < once.sum() < 40
    assert torch.equal(once, thrice)

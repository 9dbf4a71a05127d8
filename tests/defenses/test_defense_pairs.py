"""What the defenses of conf/defense promise in pairs; a new YAML file is found by itself."""

import copy
from dataclasses import fields, is_dataclass, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from contract_parts import (
    CLASSES,
    RECIPES,
    REGULARIZERS,
    WRAPS,
    Network,
    draws,
    global_states,
    gradient_of,
    images,
    outputs_of,
    ready,
    settings,
    transforms_of,
    victim_of,
    workshop,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robustbench_local.building import build_defense
from robustbench_local.defenses import Defense, Preprocess, check_defense
from robustbench_local.errors import UserError
from robustbench_local.randomness import reseed
from robustbench_local.training.step import Step

# Every pair in one order, every part now first and now second.
PAIRS = [
    (two, one) if (WRAPS.index(one) + WRAPS.index(two)) % 2 else (one, two)
    for one, two in combinations(WRAPS, 2)
]
TRAINED = list(product([*RECIPES, *REGULARIZERS], WRAPS))


def few_fast(pairs: list[tuple[str, str]], every: int) -> list[Any]:
    """Each `every`th pair among the fast tests, the others among the slow ones."""
    return [
        pytest.param(*pair, marks=pytest.mark.slow if number % every else ())
        for number, pair in enumerate(pairs)
    ]


UNFIT = {("randomized_smoothing", "art"): "ART failed .*Negative values"}
"""Wraps of which the second cannot take what the first returns: its trial says so."""


def together(first: str, second: str, channels: int) -> Defense | None:
    """Both wraps, or None where they refuse each other and say how to type it instead."""
    wraps = {**ready(first, channels).wrap, **ready(second, channels).wrap}
    try:
        return Defense(wrap=wraps)
    except UserError as refusal:
        said = str(refusal)
        assert first in said and second in said and "; type defense=" in said
        return None


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_lists_compose_in_the_order_given(order: int) -> None:
    names = WRAPS[::order]
    node = settings(RECIPES[0], *REGULARIZERS[::order], *names)
    assert list(node.wrap) == names
    assert list(node.regularize) == REGULARIZERS[::order]
    assert list(node.recipe) == RECIPES[:1]


@pytest.mark.parametrize(("first", "second"), few_fast(PAIRS, 7))
def test_two_wraps_make_one_victim(first: str, second: str) -> None:
    defense = together(first, second, 3)
    if defense is None:
        return
    if (first, second) in UNFIT:
        with pytest.raises(UserError, match=UNFIT[first, second]):
            check_defense(defense, Network(3), workshop(3).data)
        return
    assert defense.name == f"{first}+{second}"
    victim, x = victim_of(defense, 3), images(3, 17, 20, count=2)
    weight = torch.rand(2, outputs_of(victim), generator=torch.Generator().manual_seed(0))
    before, states = x.clone(), global_states()

    reseed(victim, 1)
    logits = victim(x).detach()
    reseed(victim, 1)
    gradient = gradient_of(victim, x, weight)

    assert logits.shape == (2, outputs_of(victim)) and logits.isfinite().all()
    assert gradient.isfinite().all() and gradient.flatten(1).abs().amax(1).min() > 0
    assert torch.equal(x, before) and global_states() == states
    reseed(victim, 1)
    assert torch.equal(victim(x).detach(), logits)
    reseed(victim, 2)
    assert torch.equal(victim(x).detach(), logits) != draws(victim)
    if all(isinstance(part, Preprocess) for part in defense.wrap.values()):
        # The first one named meets the image first.
        inside = [type(part) for part in transforms_of(victim)]
        assert inside == [type(part) for part in defense.wrap.values()]
        torch.testing.assert_close(logits, by_hand(victim, x))
        torch.testing.assert_close(gradient, chained(victim, x, weight))


def at_seed(victim: nn.Module, seed: int) -> tuple[Preprocess, Preprocess]:
    """Copies of the two transforms, where `reseed` puts them."""
    victim = copy.deepcopy(victim)
    reseed(victim, seed)
    one, two = transforms_of(victim)
    return one, two


def by_hand(victim: nn.Module, x: Tensor) -> Tensor:
    one, two = at_seed(victim, 1)
    with torch.no_grad():
        return Network(3)(two.transform(one.transform(x)))


def chained(victim: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the network, then that of the second stand-in, then that of the first."""
    one, two = at_seed(victim, 1)
    with torch.no_grad():
        middle = one.transform(x)
        last = two.transform(middle)
    gradient = gradient_of(Network(3), last, weight)
    one_again, two_again = at_seed(victim, 1)
    # What stands in for a draw has seen that draw.
    for part, drawn, point in ((two_again, two, middle), (one_again, one, x)):
        function = part.transform if part.differentiable else drawn.surrogate
        gradient = gradient_of(function, point, gradient)
    return gradient


def in_training(part: object) -> object:
    """The same part, such that recipes train the network behind it; itself where it cannot."""
    if isinstance(part, Preprocess):
        part = copy.deepcopy(part)
        part.in_training = True
    elif is_dataclass(part) and "in_training" in {field.name for field in fields(part)}:
        part = replace(part, in_training=True)
    return part


@pytest.mark.parametrize(("training", "wrap"), few_fast(TRAINED, 5))
def test_a_recipe_trains_the_network_behind_a_wrap(training: str, wrap: str) -> None:
    half = build_defense(settings(training))
    parts = {wrap: in_training(ready(wrap, 1).wrap[wrap])}
    defense = Defense(recipe=half.recipe, regularize=half.regularize, wrap=parts)  # type: ignore[arg-type]
    assert defense.name == f"{training}+{wrap}"
    recipe = defense.training_recipe.prepare(workshop(1))
    x, y = images(1, 28, 28), torch.arange(4) % CLASSES

    def step() -> Tensor:
        network = Network(1)
        seen = defense.through(network).train()
        reseed(seen, 1)
        begun = recipe.begin()  # an epoch anew
        loss, _ = begun.loss(
            seen, Step(x, y, criterion=cross_entropy, progress=0.9, number=3, seed=1)
        )
        loss.backward()
        return torch.cat([weight.grad.flatten() for weight in network.parameters()])

    states = global_states()
    gradient = step()
    assert gradient.isfinite().all() and float(gradient.abs().max()) > 0
    assert global_states() == states
    torch.testing.assert_close(step(), gradient, rtol=0, atol=0)
    reseed(victim := victim_of(defense, 1), 1)
    assert victim(x).shape == (4, outputs_of(victim))

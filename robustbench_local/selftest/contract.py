"""What every attack promises whatever the victim: nothing is left changed, nothing is exceeded."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from robustbench_local.attacks import Attack
from robustbench_local.errors import FoulError, UserError
from robustbench_local.gradients import pristine
from robustbench_local.oracle import Oracle
from robustbench_local.selftest.victims import BrokenDownError, Delicate, Raising
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels

CHANNELS, CLASSES = 3, 4

Promise: TypeAlias = Callable[[Attack, ThreatModel], Iterator[str]]
"""Tries an attack; gives a sentence for everything that is wrong."""


def broken_promises(attack: Attack, threat: ThreatModel) -> Iterator[str]:
    """A sentence for each promise that the attack does not keep on a small network."""
    model = Delicate(CHANNELS, CLASSES)
    x, y = batch(model)
    before, changes = x.clone(), watch(model)
    x_adv = _run(attack, model, x, y, threat)
    if not torch.equal(x, before):
        yield "it modifies the images it is given"
    yield from changes()
    if (x_adv.shape, x_adv.dtype, x_adv.device) != (x.shape, x.dtype, x.device):
        yield f"it returns {x_adv.dtype} of shape {tuple(x_adv.shape)} for {tuple(x.shape)}"
        return
    if x_adv.requires_grad:
        yield "what it returns carries a graph"
    try:
        threat.check(x_adv, before)
    except FoulError as error:
        yield str(error)
    again = _run(attack, model, before.clone(), y, threat)
    if not torch.equal(x_adv, again):
        yield "the same seed gives another result"
    with torch.no_grad():
        silent = _run(attack, model, before.clone(), y, threat)
    if not torch.equal(x_adv, silent):
        yield "under torch.no_grad() the result is another"
    # Other libraries draw for the whole batch at once, which is known of them.
    if not attack.foreign:
        halves = zip(before.chunk(2), y.chunk(2), strict=True)
        parts = torch.cat([_run(attack, model, *half, threat) for half in halves])
        if not torch.allclose(parts, x_adv, rtol=0, atol=1e-6):
            yield (
                "the result for an image depends on the others in the batch; expected draws from "
                "robustbench_local.randomness.Draws, not from torch's global generator, and no "
                "decision taken over the whole batch"
            )
    yield from _takes_more(attack, model, before, y, threat, x_adv)


def _takes_more(
    attack: Attack, model: nn.Module, x: Images, y: Labels, threat: ThreatModel, x_adv: Images
) -> Iterator[str]:
    """What is wrong where the attack is given no more access than it says it needs."""
    if attack.needs == threat.access:
        return
    told = f"it says needs = {attack.needs!r} and needs more"
    try:
        found = _run(attack, model, x, y, replace(threat, access=attack.needs))
    except UserError:  # its settings ask for more, such as a class to reach, and it says so
        return
    except RuntimeError as error:  # of autograd: there is no graph
        yield f"{told}: {error}"
        return
    with pristine(model), torch.no_grad():
        alone, before = (int((model(images).argmax(1) != y).sum()) for images in (found, x_adv))
    if alone < before:
        yield f"{told}: given that alone it breaks {alone} images instead of {before}"


def after_one_call(attack: Attack, threat: ThreatModel) -> Iterator[str]:
    """What is wrong where the victim breaks down at once."""
    return _after_an_exception(attack, threat, 1)


def after_three_calls(attack: Attack, threat: ThreatModel) -> Iterator[str]:
    """What is wrong where the victim breaks down on the way."""
    return _after_an_exception(attack, threat, 3)


def _after_an_exception(attack: Attack, threat: ThreatModel, calls: int) -> Iterator[str]:
    victim = Raising(Delicate(CHANNELS, CLASSES), calls)
    x, y = batch(victim.model)
    changes = watch(victim)
    try:
        _run(attack, victim, x, y, threat)
    except BrokenDownError:
        pass
    else:
        if victim.left <= 0:
            yield "it goes on as if nothing had happened when the victim raises an exception"
    yield from changes()


def at_epsilon_zero(attack: Attack, threat: ThreatModel) -> Iterator[str]:
    """What is wrong where nothing may be changed."""
    model = Delicate(CHANNELS, CLASSES)
    x, y = batch(model)
    if not torch.equal(_run(attack, model, x, y, replace(threat, epsilon=0)), x):
        yield "it changes images although epsilon is 0"


def _run(attack: Attack, model: nn.Module, x: Images, y: Labels, threat: ThreatModel) -> Images:
    oracle = Oracle(model, threat, CLASSES, randomized=False)
    oracle.begin(len(x))
    return attack(oracle, x, y, threat)


def batch(model: nn.Module) -> tuple[Images, Labels]:
    """8x8 images, half of their pixels exactly 0 or 1, and what the model says to them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-120, 376, (8, CHANNELS, 8, 8), generator=generator)
    x = x.clamp_(0, 255).float().div_(255)
    with pristine(model), torch.no_grad():
        return x, model(x).argmax(1)


def watch(model: nn.Module) -> Callable[[], Iterator[str]]:
    """Remember all that an attack may not change; the result says what it has."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [weight.requires_grad for weight in model.parameters()]
    gradients = [None if w.grad is None else w.grad.clone() for w in model.parameters()]
    generators = random.getstate(), _numpy_state(), torch.get_rng_state()

    def changes() -> Iterator[str]:
        if any(not torch.equal(value, state[name]) for name, value in model.state_dict().items()):
            yield "it changes weights or statistics of the victim"
        if [module.training for module in model.modules()] != modes:
            yield "it leaves train/eval flags of the victim changed"
        if [weight.requires_grad for weight in model.parameters()] != wanted:
            yield "it leaves requires_grad of the victim's weights changed"
        now = [weight.grad for weight in model.parameters()]
        if any(not _same(one, other) for one, other in zip(now, gradients, strict=True)):
            yield "it leaves gradients in the victim's weights"
        if random.getstate() != generators[0]:
            yield "it moves Python's global generator"
        if _numpy_state() != generators[1]:
            yield "it moves NumPy's global generator"
        if not torch.equal(torch.get_rng_state(), generators[2]):
            yield "it moves torch's global generator"
        if not torch.is_grad_enabled():
            yield "it leaves autograd switched off"

    return changes


def _numpy_state() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()
    return name, np.asarray(keys).tobytes(), *rest


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)

"""Whether the victim answers otherwise when it is attacked than when it is judged."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_local.evaluation.audit.check import Check, found, skipped
from robustbench_local.gradients import pristine, seed_global
from robustbench_local.randomness import reseed
from robustbench_local.types import Images, Logits, Model

_NORMAL_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
)
"""Layers that are meant to differ in training."""


def gradient_switch(victim: Model, x: Images, *, spread: float) -> Check:
    """Compare the judge's answer with those that an attack gets.

    - with autograd switched on, and with an image that wants a gradient;
    - with the train/eval flags of training, but for normalisation and dropout layers. What is
      random in training alone (any other dropout) is regularisation and left out;
    - and count calls of autograd inside the forward pass: a defense that optimises while it
      answers (Croce and Hein 2020, arXiv:2003.01690, their check of dynamic defenses).

    All passes share their random draws, so that randomised victims are compared too, and a
    difference is a distance of normalised logits above `spread`. Of a victim whose draws nobody can
    seed it is one that is many times what passes of the same kind differ by; a smaller one cannot
    be told from chance, and nothing is said.
    """
    name = "gradient_switch"
    with counted_autograd() as calls:
        judged = _answer(victim, x, torch.no_grad)
        again = _answer(victim, x, torch.no_grad)
        enabled = _answer(victim, x, torch.enable_grad)
        wanted = _answer(victim, x, torch.enable_grad, wanted=True)
    measured: dict[str, float | int | None] = {"autograd_calls": calls[0]}
    if calls[0]:
        why = f"4 forward passes called autograd {calls[0]} times: the defense optimises"
        return found(name, True, measured, why)
    measured |= {
        "grad_enabled": distance(judged, enabled),
        "requires_grad": distance(judged, wanted),
        "train_mode": _train_mode(victim, x, judged, spread),
    }
    unsettled, limit = distance(judged, again), spread
    if max(unsettled, *(value or 0 for value in measured.values())) > spread:
        same = [judged, again, *(_answer(victim, x, torch.no_grad) for _ in range(_MORE))]
        unsettled = max(distance(*pair) for pair in combinations(same, 2))
    if unsettled > spread:
        limit = _TIMES * unsettled
        measured["same_seeds"] = unsettled
        measured["train_mode"] = _train_mode(victim, x, judged, limit)
    told = {
        "grad_enabled": "when gradients are switched on",
        "requires_grad": "when gradients are recorded",
        "train_mode": "in train mode",
    }
    for key, when in told.items():
        value = measured[key]
        if value is not None and value > limit:
            return found(name, True, measured, f"the outputs change by up to {value:.2g} {when}")
    if unsettled > spread:
        why = (
            f"passes with the same seeds differ by up to {unsettled:.2g}, so that a switch could "
            "not be told from chance; forward passes do not call autograd"
        )
        return skipped(name, why)
    return found(name, False, measured, "with autograd or train mode the outputs are the same")


_MORE = 3
"""Further passes that tell how much a victim differs whose draws nobody can seed."""

_TIMES = 10
"""A switch is so many times larger."""


def distance(one: Logits, other: Logits) -> float:
    """Largest L2 distance between the normalised logits of an image."""
    if len(one) == 0:
        return 0.0
    first, second = (functional.normalize(part.double(), dim=1) for part in (one, other))
    return float((first - second).norm(dim=1).max())


def _answer(
    victim: Model,
    x: Images,
    autograd: Callable[[], torch.no_grad | torch.enable_grad],
    *,
    wanted: bool = False,
    seed: int = 0,
    prepare: Callable[[], None] = lambda: None,
) -> Logits:
    """One forward pass with all random draws pinned; `prepare` may set flags before it."""
    with pristine(victim):
        seed_everything(victim, seed)
        prepare()
        with autograd():
            logits: Tensor = victim(x.clone().requires_grad_(wanted))
    return logits.detach()


def seed_everything(victim: Model, seed: int) -> None:
    """Pin the global generators and the victim's own; `pristine` puts back the former."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    seed_global(seed)
    reseed(victim, seed)


def _train_mode(victim: Model, x: Images, judged: Logits, limit: float) -> float | None:
    """How far the outputs are off in train mode; None where that is no sign of anything.

    `limit` is the largest distance that is none.
    """
    parts = [module for module in victim.modules() if not _is_normal(module)]
    buffers = [(buffer, buffer.clone()) for buffer in victim.buffers()]

    def train() -> None:
        for part in parts:
            part.training = True

    def answer(seed: int) -> Logits:
        return _answer(victim, x, torch.no_grad, seed=seed, prepare=train)

    try:
        first, second = answer(0), answer(1)
    except Exception:  # some have further outputs in training, or need labels
        return None
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if first.shape != judged.shape:
        return None
    off = distance(judged, first)
    noise = distance(first, second)
    steady = distance(judged, _answer(victim, x, torch.no_grad, seed=1)) <= limit
    return None if off > limit and noise > limit and steady else off


def _is_normal(module: nn.Module) -> bool:
    tracks = any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))
    return isinstance(module, _NORMAL_LAYERS) or tracks


@contextmanager
def counted_autograd() -> Iterator[list[int]]:
    """Count, in the list given, the calls of `grad` and `backward`, under whatever name."""
    calls = [0]
    gate = "_make_grads"  # both go through it
    original: Callable[..., Any] = getattr(torch.autograd, gate)

    def counting(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        return original(*arguments, **named)

    setattr(torch.autograd, gate, counting)
    try:
        yield calls
    finally:
        setattr(torch.autograd, gate, original)

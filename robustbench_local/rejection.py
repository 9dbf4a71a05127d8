"""Victims that may refuse an image, and how an attacker counts that: as no success.

Such a victim answers with K+1 logits, the last of which is the largest exactly when it rejects the
image, and one of its modules says `abstains = True`. An attack succeeds where the victim accepts
the image and is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from robustbench_local.types import Labels, Logits

_REJECTING: ContextVar[bool] = ContextVar("rejecting", default=False)
"""Whether the last logit of what is attacked now is that of rejection."""


def abstains(model: nn.Module) -> bool:
    """Whether any part of the model declares that it may reject images (`abstains = True`)."""
    return any(getattr(module, "abstains", False) is True for module in model.modules())


@contextmanager
def facing(model: nn.Module) -> Iterator[None]:
    """Inside, logits are those of this model: the functions below know whether it may reject.

    Losses see logits and no model, so they are told here. May be nested, as by an attack that turns
    to a model of its own; what held before holds again afterwards, also after an exception.
    """
    before = _REJECTING.set(abstains(model))
    try:
        yield
    finally:
        _REJECTING.reset(before)


def class_scores(logits: Logits) -> Logits:
    """The logits of the classes alone, (N, K)."""
    return logits[:, :-1] if _REJECTING.get() else logits


def folded(logits: Logits, y: Labels, *, sum_odds: bool = False) -> Logits:
    """The logits (N, K) of a victim without rejection that resists exactly where this one does.

    Being rejected is as good for the victim as being right: the logit of class `y` is the larger
    one of its own and that of rejection. With `sum_odds` it is that of both probabilities together,
    for losses made of probabilities.
    """
    if not _REJECTING.get():
        return logits
    classes, rejection = logits[:, :-1], logits[:, -1:]
    true = classes.gather(1, y[:, None])
    together = torch.logaddexp if sum_odds else torch.maximum
    return classes.scatter(1, y[:, None], together(true, rejection))


def rejected(logits: Logits) -> Tensor:
    """Which images are rejected, shape (N,); ties as `argmax` breaks them: accepted."""
    if not _REJECTING.get():
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    return logits.detach().argmax(1) == logits.shape[1] - 1

"""Which class a targeted attack wants, the same for an example whatever batch it is in."""

from typing import TypeAlias

import torch

from robustbench_local.errors import UserError
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.rejection import class_scores
from robustbench_local.types import Images, Labels, Model

Target: TypeAlias = str | int | None
"""None (any wrong class), `random`, `least_likely`, `next`, or the number of a class."""

_RULES = ("random", "least_likely", "next")


def check_target(target: Target) -> None:
    """Raise `UserError` for anything but a rule or a class number."""
    whole = isinstance(target, int) and not isinstance(target, bool) and target >= 0
    if target is not None and target not in _RULES and not whole:
        raise UserError(
            f"attack.target={target}; expected {', '.join(_RULES)}, the number of a class, or null "
            "for any wrong class"
        )


def check_class(target: Target, classes: int) -> None:
    """Raise `UserError` for a class the model does not have."""
    if isinstance(target, int) and target >= classes:
        raise UserError(
            f"attack.target={target} is out of range; expected a class from 0 to {classes - 1}"
        )


def choose_targets(target: Target, model: Model, x: Images, y: Labels, *, seed: int = 0) -> Labels:
    """The class wanted of every example, shape (N,), int64.

    `random` draws among the wrong classes, `next` is y + 1, `least_likely` (Kurakin et al. 2017,
    arXiv:1607.02533) the class of the smallest logit that is not y. A class number holds for all
    examples; where it is the label itself there is nothing to attack. Raises `UserError` for a
    class the model does not have.
    """
    check_target(target)
    with torch.no_grad():
        logits = class_scores(model(x if target == "least_likely" else x[:1]))
    classes = logits.shape[1]
    wanted = y.clone()
    if target == "random":
        draw = Draws(x, derive_seed(seed, "target")).uniform(1).squeeze(1)
        wanted = (y + 1 + (draw * (classes - 1)).long()) % classes
    elif target == "next":
        wanted = (y + 1) % classes
    elif target == "least_likely":
        wanted = logits.scatter(1, y[:, None], torch.inf).argmin(1)
    elif isinstance(target, int):
        check_class(target, classes)
        wanted.fill_(target)
    return wanted

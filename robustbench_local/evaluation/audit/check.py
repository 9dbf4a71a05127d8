"""What an audit says: every check with what it measured, whether or not it raised a flag."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from robustbench_local.errors import FoulError, UserError

SEVERE = {
    "oblivious": True,
    "subset": False,
    "randomized": True,
    "eot_unstable": False,
    "gradient_switch": True,
    "softmax_output": False,
    "zero_gradient": True,
    "silent_success": False,
    "loss_still_falling": False,
    "not_converged": False,
    "non_monotone_epsilon": False,
    "unconstrained_failure": True,
    "weaker_than_fgsm": True,
    "weaker_than_black_box": True,
    "noise_as_strong": True,
    "frozen_randomness": True,
}
"""Every flag there is, and whether it withholds the rank."""

COSTLY = (
    "silent_success",
    "loss_still_falling",
    "not_converged",
    "non_monotone_epsilon",
    "unconstrained_failure",
    "weaker_than_fgsm",
    "weaker_than_black_box",
    "noise_as_strong",
    "frozen_randomness",
)
"""The checks that attack the victim again; the others only look at it."""

OF_THE_ATTACK = frozenset({"randomized", *COSTLY})
"""Flags that doubt one attack and not the victim: a stronger attack without them answers them."""


@dataclass(frozen=True)
class Check:
    """One check: its name, whether its flag withholds the rank, and what came out.

    `raised` is None for a check that does not apply, of which `why` says the reason; else `why` is
    the finding. `measured` holds the numbers behind it, as JSON does.
    """

    name: str
    severe: bool
    raised: bool | None
    measured: Mapping[str, Any]
    why: str


def found(
    name: str, raised: bool, measured: Mapping[str, Any], why: str, *, severe: bool | None = None
) -> Check:
    """A check that was made; `severe` where this finding weighs otherwise than the flag does."""
    return Check(name, SEVERE[name] if severe is None else severe, raised, measured, why)


def skipped(name: str, why: str) -> Check:
    """A check that does not apply, and the reason."""
    return Check(name, SEVERE[name], None, {}, why)


def attempted(name: str, check: Callable[[], Check]) -> Check:
    """The check, or one that is skipped because something broke down while it was made.

    The evaluation went through or is still to come: neither may be lost over a check.
    """
    try:
        return check()
    except Exception as error:
        return skipped(name, f"the check could not be made: {told(error)}")


def told(error: Exception) -> str:
    """What an exception says, in a sentence; with its name where it was not meant for users."""
    name = "" if isinstance(error, UserError | FoulError) else type(error).__name__
    return f"{name} {error}".strip()


def flags(checks: Iterable[Check]) -> list[Check]:
    """The checks that raised their flag."""
    return [check for check in checks if check.raised]


def count(number: int, noun: str) -> str:
    """For sentences: "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""Reading the settings of a defense, and saying in one sentence what is wrong with one."""

import math
from collections.abc import Callable
from fractions import Fraction

from robustbench_local.attacks import Attack
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel


def read_number(
    key: str, value: object, *, fits: Callable[[float], bool], expected: str, example: float
) -> float:
    """A finite number that `fits`, also written as a fraction such as "8/255".

    `key` is that of the configuration, such as `defense.wrap.noise_fusion.amplitude`. Raises
    `UserError` for anything else.
    """
    number = _parse(value)
    if number is None or not fits(number):
        raise UserError(f"{key}={value}; expected {expected}: type {key}={example:g}")
    return number


def require_count(key: str, value: object, *, example: int, least: int = 1) -> None:
    """Raise `UserError` unless the value is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(
            f"{key}={value}; expected a whole number, {least} or more: type {key}={example}"
        )


def require_flag(key: str, value: object) -> None:
    """Raise `UserError` unless the value is true or false; a word such as "no" would be true."""
    require_kind(key, value, bool, expected="true or false", example="=true")


def require_kind(key: str, value: object, kind: type, *, expected: str, example: str) -> None:
    """Raise `UserError` unless the value is of a kind; `example` follows its key."""
    if not isinstance(value, kind):
        shown = "null" if value is None else value
        raise UserError(f"{key}={shown}; expected {expected}: type {key}{example}")


def require_attack(key: str, value: object) -> None:
    """Raise `UserError` unless the value is an attack."""
    target = "._target_=robustbench_local.attacks.PGD"
    require_kind(key, value, Attack, expected="an attack with _target_", example=target)


def require_budget(key: str, value: object) -> None:
    """Raise `UserError` unless the value is a threat model."""
    require_kind(
        key, value, ThreatModel, expected="a threat model with _target_", example=".epsilon=8/255"
    )


def _parse(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if math.isfinite(number) else None

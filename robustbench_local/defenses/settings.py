"""Reading the settings of a defense, and saying in one sentence what is wrong with one."""

import math
from fractions import Fraction

from robustbench_local.errors import UserError


def read_above_zero(key: str, value: object, *, example: float, what: str) -> float:
    """A finite number above 0, also written as a fraction such as "8/255".

    `key` is that of the configuration, such as `defense.wrap.noise_fusion.amplitude`, and `what`
    says what the number is. Raises `UserError` for anything else.
    """
    number = _number(value)
    if number is None or not number > 0:
        raise UserError(f"{key}={value}; expected {what} above 0: type {key}={example:g}")
    return number


def read_from_zero(key: str, value: object, *, example: float, what: str) -> float:
    """A finite number, 0 or more, also written as a fraction. Raises `UserError` otherwise."""
    number = _number(value)
    if number is None or not number >= 0:
        raise UserError(f"{key}={value}; expected {what}, 0 or more: type {key}={example:g}")
    return number


def require_count(key: str, value: object, *, example: int, least: int = 1) -> None:
    """Raise `UserError` unless the value is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(
            f"{key}={value}; expected a whole number, {least} or more: type {key}={example}"
        )


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if math.isfinite(number) else None

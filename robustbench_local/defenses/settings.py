"""Reading the settings of a defense, and saying in one sentence what is wrong with one."""

import math
from collections.abc import Callable
from fractions import Fraction

from robustbench_local.errors import UserError


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


def _parse(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if math.isfinite(number) else None

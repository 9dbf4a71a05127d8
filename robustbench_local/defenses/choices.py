"""Settings of which only some whole numbers mean something."""

from collections.abc import Container

from robustbench_local.errors import UserError

ODD = range(3, 1000, 2)


def require_one_of(
    key: str, value: object, allowed: Container[int], *, expected: str, example: int
) -> int:
    """`value`, or a `UserError` unless it is a whole number that is `allowed`.

    `key` is that of the configuration, such as `defense.wrap.median.size`; `expected` says in words
    what is allowed, and `example` is one such.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise UserError(f"{key}={value}; expected {expected}: type {key}={example}")
    return value

"""Classes that the configuration names: what does not fit is told in a sentence.

Only what can be seen from outside is looked at, such as names and signatures. What goes wrong
inside somebody's code keeps its traceback.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

from torch import nn

from robustbench_local.errors import UserError
from robustbench_local.identity import PACKAGE


def check_target(name: str, place: str) -> None:
    """Raise `UserError` unless `name`, the `_target_` at `place`, is there and can be called.

    A module that is there and fails while it is imported raises what it raises.
    """
    key = f"{'++' if place.startswith('defense.') else ''}{place}._target_"
    home, _, last = name.rpartition(".")
    example = "mypackage.MyClass"
    reason = "it is not of the form MODULE.CLASS"
    if home and all(name.split(".")):
        try:
            import_module(home)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # one that theirs needs
            home = str(error.name).rpartition(".")[0]  # a class may lie in a class
            last = name.removeprefix(f"{home}.")
        reason = f"there is no module {name.partition('.')[0]}"
        if home:
            found = sys.modules[home]
            try:
                if callable(attrgetter(last)(found)):
                    return
            except AttributeError:
                pass
            kinds = [each for each, value in vars(found).items() if inspect.isclass(value)]
            near = difflib.get_close_matches(last, kinds, 1)
            example = f"{home}.{near[0] if near else 'MyClass'}"
            reason = f"{home} has no class {last}"
    raise UserError(
        f"{place}._target_={name} cannot be found ({reason}); expected a class by its full name, "
        f"installed or in the folder you start from: type {key}={example}"
    )


def check_call(target: Any, name: str, place: str, given: Collection[str]) -> None:
    """Raise `UserError` unless `target`, which `name` stands for, can be built from the keys given.

    These are those of the configuration at `place`.
    """
    if inspect.isabstract(target):
        lacking = sorted(target.__abstractmethods__)
        raise UserError(
            f"{name} has no {' and no '.join(lacking)}; expected as in {_ours(target)}: type "
            f"def {lacking[0]}({_names(getattr(target, lacking[0]))}): in its body"
        )
    try:
        accepted = inspect.signature(target).parameters
    except ValueError:  # written in C
        return
    kinds = {parameter.kind for parameter in accepted.values()}
    anything = inspect.Parameter.VAR_KEYWORD in kinds
    named = [key for key, value in accepted.items() if value.kind not in _VARIABLE]
    shown = target.__qualname__ if is_ours(target) else name
    unknown = [] if anything else [key for key in given if key not in named]
    if unknown:
        listed = f"one of {', '.join(named)}" if named else "none at all"
        typed = f"{place}.KEY=VALUE"
        if unknown[0] in inspect.get_annotations(
            target
        ):  # a field, in a class that is no dataclass
            typed = "@dataclass(frozen=True, kw_only=True) above the class"
        elif "." not in place and not is_ours(target):  # met with the keys of another one's file
            typed = (
                f"{place}=mine --config-dir DIR, with _target_: {name} and these keys alone in "
                f"DIR/{place}/mine.yaml"
            )
        raise UserError(
            f"{place}.{unknown[0]} is not a key of {shown}; expected {listed}: type {typed}"
        )
    for key in named:
        if accepted[key].default is inspect.Parameter.empty and key not in given:
            raise UserError(
                f"{place}.{key} is not given and {shown} has no default for it; expected a value: "
                f"type +{place}.{key}=VALUE"
            )


def check_parts(built: object, seen: Collection[int] = ()) -> None:
    """Raise `UserError` where a class from elsewhere cannot be used as its base of ours is.

    Its methods take what those of the base take, and what the base announces is there. Looks at
    the values of a mapping, and at the fields of a dataclass, too.
    """
    if id(built) in seen:  # parts may refer to each other
        return
    seen = {*seen, id(built)}
    if isinstance(built, Mapping):
        for value in built.values():
            check_parts(value, seen)
    elif is_dataclass(built) and not isinstance(built, type):
        for field in fields(built):
            check_parts(getattr(built, field.name, None), seen)
    kind = type(built)
    if is_ours(kind):
        return
    for base in filter(is_ours, kind.__mro__):
        _check_against(built, base)


def _check_against(built: object, base: type) -> None:
    name = f"{type(built).__module__}.{type(built).__qualname__}"
    if isinstance(built, nn.Module) and not hasattr(built, "training"):
        raise UserError(
            f"the constructor of {name} leaves out that of {base.__qualname__}; expected it first: "
            "type super().__init__()"
        )
    set_by_constructor = {field.name for field in fields(base)} if is_dataclass(base) else set()
    for key in inspect.get_annotations(base):
        if not key.startswith("_") and not hasattr(built, key):
            typed = "super().__init__() first in its constructor"
            if key not in set_by_constructor:
                typed = f"{key} = VALUE in its body"
            raise UserError(
                f"{name} has no {key}; expected as in {_ours(type(built))}: type {typed}"
            )
    for key, method in vars(base).items():
        if key.startswith("_") or not inspect.isfunction(method):
            continue
        if not _takes(getattr(built, key), method):
            given = _names(method).partition(", ")[2]
            raise UserError(
                f"{name}.{key} cannot be called with ({given}); expected as in "
                f"{_ours(type(built))}: type def {key}({_names(method)}):"
            )


def takes_one(part: object) -> bool:
    """Whether `part` can be called with a single argument."""
    return _takes(part, lambda self, argument: None)


def _takes(own: object, method: Callable[..., Any]) -> bool:
    """Whether `own`, bound, can be called with all that `method`, unbound, takes."""
    if not callable(own):
        return False
    _, *parameters = inspect.signature(method).parameters.values()
    named = {p.name: None for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    positional = [p for p in parameters if p.kind not in (*_VARIABLE, p.KEYWORD_ONLY)]
    try:
        # Of the wrapper, where there is one: what it takes is what it is called with.
        inspect.signature(own, follow_wrapped=False).bind(*positional, **named)
    except TypeError:
        return False
    except ValueError:  # written in C
        return True
    return True


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _names(method: Callable[..., Any]) -> str:
    return ", ".join(inspect.signature(method).parameters)


def is_ours(kind: Any) -> bool:
    """Whether a class or function is one of this package."""
    return str(getattr(kind, "__module__", "")).partition(".")[0] == PACKAGE.name


def _ours(kind: type) -> str:
    """The nearest base of ours, by its full name."""
    base = next(filter(is_ours, kind.__mro__), kind)
    return f"{base.__module__}.{base.__qualname__}"

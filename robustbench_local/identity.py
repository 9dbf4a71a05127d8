"""Names for things by their content: what decides a number, and the code that computes it."""

import ast
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from robustbench_local.errors import UserError

PACKAGE = Path(__file__).parent


def content_id(parts: Mapping[str, object]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the parts as canonical JSON."""
    try:
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError(
            "a setting is NaN or infinite; expected finite numbers: see them all with --cfg job"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_version(*parts: str) -> str:
    """A hash of the package's code below these files or folders, relative to the package.

    Comments, docstrings and layout do not count: mending a sentence retrains nothing.
    """
    digest = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(PACKAGE).as_posix().encode())
            digest.update(_meaning(file.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]


def find_object(name: str) -> Any:
    """What a dotted name stands for. Raises whatever importing it raises, and `AttributeError`.

    Like `hydra.utils.get_object`, which prints its own account of a failure.
    """
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def class_version(cls: type) -> str:
    """A hash of the code that defines a class or function.

    Of this package: its own file. From elsewhere: every file of the package it belongs to, since
    its parts may lie in any of them, or its file where it belongs to none.
    """
    top = cls.__module__.partition(".")[0]
    try:
        file = Path(inspect.getfile(cls))
        files = [file]
        folders = list(getattr(sys.modules.get(top), "__path__", []))
        if top != PACKAGE.name and folders:
            files = sorted(Path(folders[0]).rglob("*.py"))
        text = "".join(_meaning(file.read_text(encoding="utf-8")) for file in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    except (OSError, TypeError, SyntaxError):  # from a console or in C: its name is all there is
        return f"{cls.__module__}.{cls.__qualname__}"


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return ast.dump(tree)

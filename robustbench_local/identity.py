"""Names for things by their content: what decides a number, and the code that computes it."""

import ast
import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

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


def class_version(cls: type) -> str:
    """The same for a class from outside the package: the module that defines it."""
    try:
        return hashlib.sha256(
            _meaning(Path(inspect.getfile(cls)).read_text(encoding="utf-8")).encode()
        ).hexdigest()[:16]
    except (OSError, TypeError):  # defined in a console or in C: its name is all there is
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

"""Weights from a file, without ever running code that came with it."""

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from robustbench_local.errors import UserError
from robustbench_local.models.normalize import Normalized

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_CONVERT = (
    "in the program that made it type torch.save(model.state_dict(), FILE) or "
    "safetensors.torch.save_file(model.state_dict(), FILE)"
)


def load_checkpoint(model: Normalized, path: Path | str) -> None:
    """Load weights into the network, or into the whole where they hold the normalisation too.

    `path` is a `.safetensors` file or a state dict written by `torch.save`; a state dict inside
    `{"state_dict": ...}` or `{"model": ...}` and names that begin with `module.` are understood.
    Raises `UserError` where the file is missing, damaged, holds pickled code (which is never run),
    or does not fit name by name and shape by shape.
    """
    path = Path(path).expanduser()
    weights = _unwrap(_read(path), path)
    # Measured against the network first: its own layers may be called "network" as well.
    inner = set(weights) == set(model.network.state_dict())
    whole = not inner and all(name.startswith(("network.", "normalize.")) for name in weights)
    target = model if whole else model.network
    _check(weights, target.state_dict(), path)
    target.load_state_dict(weights)


def _read(path: Path) -> object:
    expected = "expected a .safetensors file or a state dict written by torch.save"
    if not path.is_file() or path.stat().st_size == 0:
        state = "is empty" if path.is_file() else "is not a file" if path.exists() else "is missing"
        raise UserError(f"model.checkpoint={path} {state}; {expected}: type model.checkpoint=FILE")
    with path.open("rb") as file:
        begins = file.read(2)
    if path.suffix != ".safetensors" and begins != b"PK" and begins[:1] != b"\x80":
        raise UserError(
            f"model.checkpoint={path} holds no weights; {expected}: type model.checkpoint=FILE"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error):
            raise UserError(
                f"model.checkpoint={path} holds pickled code and is refused, because loading it "
                f"could run anything; expected weights only: {_CONVERT}"
            ) from None
        raise _damaged(path, error, expected) from error
    except Exception as error:  # foreign bytes raise whatever they meet first
        raise _damaged(path, error, expected) from error


def _damaged(path: Path, error: Exception, expected: str) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"model.checkpoint={path} cannot be read ({reason}); {expected}")


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content or not _is_state_dict(content):
        raise UserError(
            f"model.checkpoint={path} holds no state dict; expected names with tensors: {_CONVERT}"
        )
    weights: dict[str, Tensor] = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _check(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Tell everything that does not fit at once: torch names one kind after the other."""
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    findings = (
        ("missing", [name for name in wanted if name not in weights]),
        ("unexpected", [name for name in weights if name not in wanted]),
        ("wrongly shaped", shapes),
    )
    told = [_first(kind, names) for kind, names in findings if names]
    if told:
        raise UserError(
            f"model.checkpoint={path} does not fit the model: {'; '.join(told)}; expected the "
            "weights of this architecture: type model=NAME and its arguments as it was trained"
        )


def _first(kind: str, names: Sequence[str], show: int = 3) -> str:
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return f"{len(names)} {kind} ({', '.join(names[:show])}{more})"

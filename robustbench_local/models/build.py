"""From the model's configuration to a network that takes pixels."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from torch import nn

from robustbench_local.errors import UserError
from robustbench_local.gradients import pristine
from robustbench_local.identity import class_version, file_sha256, find_object
from robustbench_local.models.normalize import Normalized, pixel_statistics

if TYPE_CHECKING:
    from robustbench_local.data import Dataset

RESERVED = ("checkpoint", "mean", "std")
"""Keys of the configuration that are not arguments of the network."""


def build_model(config: Mapping[str, Any], data: "Dataset") -> Normalized:
    """A freshly initialised network for `data`, on the CPU, with normalisation in front.

    `config` is the resolved `cfg.model`: `_target_` (a class or function that returns a module),
    its arguments, and the keys in `RESERVED`. `input_shape` (C, H, W) and `num_classes` are added
    where the target names them. `mean` and `std` are taken from the training pixels where they are
    null; `mean=[0] std=[1]` suits a network that normalises by itself. A checkpoint is not loaded
    here. The initial weights are drawn from torch's global generator. Raises `UserError` for a
    target that cannot be imported and for arguments that it does not take or cannot be built with.
    """
    target = _find_target(config)
    arguments = {name: value for name, value in config.items() if name not in RESERVED}
    accepted = _parameters(target)
    given = {"input_shape": tuple(data.input_shape), "num_classes": data.num_classes}
    given = {k: v for k, v in given.items() if k in accepted and arguments.get(k) is None}
    arguments = {name: value for name, value in arguments.items() if name not in given}
    try:
        network = instantiate({**arguments, "_partial_": True}, _convert_="all")(**given)
    except (TypeError, RuntimeError) as error:
        ours = getattr(target, "__module__", "").startswith("robustbench_local.")
        if isinstance(error, RuntimeError) and not ours:  # a defect in somebody's own class, maybe
            raise
        known = ", ".join(accepted) or "none"
        reason = " ".join(str(error).split())
        raise UserError(
            f"model {config['_target_']} could not be built: {reason}; expected arguments are "
            f"{known}: type model.NAME=VALUE, or +model.NAME=VALUE for a new one"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"model._target_={config['_target_']} returned a {type(network).__name__}; expected a "
            "torch.nn.Module"
        )
    mean, std = config.get("mean"), config.get("std")
    if mean is None or std is None:
        measured = pixel_statistics(data.train.images)
        mean, std = measured[0] if mean is None else mean, measured[1] if std is None else std
    return Normalized(network, mean, std, channels=data.input_shape[0])


def _find_target(config: Mapping[str, Any]) -> Callable[..., Any]:
    name = config.get("_target_")
    try:
        target = find_object(str(name))
    except Exception as error:  # whatever importing somebody's module raises
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"model._target_={name} cannot be imported ({reason}); expected a class on the Python "
            "path, type for example model._target_=mypackage.MyNetwork"
        ) from error
    if not callable(target):
        raise UserError(f"model._target_={name} is not callable; expected a class or function")
    found: Callable[..., Any] = target
    return found


def _parameters(target: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(target).parameters)
    except ValueError:  # written in C
        return []


def model_key(config: Mapping[str, Any]) -> dict[str, object]:
    """What decides the network, for `fit(key={"model": model_key(config)})`: JSON values only.

    The configuration, the code of the module that defines the target, and in place of a
    checkpoint's path the hash of its content.
    """
    target = _find_target(config)
    checkpoint = config.get("checkpoint")
    return {
        **config,
        "checkpoint": None if checkpoint is None else file_sha256(Path(str(checkpoint))),
        "code": class_version(target),  # type: ignore[arg-type]
    }


def check_model(model: nn.Module, data: "Dataset", device: torch.device | str) -> None:
    """Raise `UserError` unless `model` keeps its contract on two test images.

    In eval mode, on `device`: float logits of shape (2, K), all finite. Leaves no trace.
    """
    x = data.test.pixels(slice(0, 2)).to(device)
    expected = (len(x), data.num_classes)
    shape = tuple(x.shape)
    try:
        with pristine(model), torch.no_grad():
            logits = model(x)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the model fails on images of shape {shape} ({reason}); expected logits of shape "
            f"{expected}: check that it is made for this dataset"
        ) from error
    if not isinstance(logits, torch.Tensor):
        raise UserError(
            f"the model returned a {type(logits).__name__}; expected a tensor of logits of shape "
            f"{expected}"
        )
    if tuple(logits.shape) != expected or not logits.is_floating_point():
        raise UserError(
            f"the model returned {str(logits.dtype).removeprefix('torch.')} of shape "
            f"{tuple(logits.shape)} for images of shape {shape}; expected float logits of shape "
            f"{expected}: check that it has {data.num_classes} classes"
        )
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            "the model returned NaN or infinite logits for two test images; expected finite "
            "numbers: check its weights, model.mean and model.std"
        )

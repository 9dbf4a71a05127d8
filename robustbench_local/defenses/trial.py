"""A defense tried on two images, before anything is trained for it."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from robustbench_local.defenses.defense import Defense, Wrapper
from robustbench_local.defenses.detection import Calibration, Detector
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.errors import UserError
from robustbench_local.gradients import pristine
from robustbench_local.oracle import check_logits
from robustbench_local.rejection import abstains
from robustbench_local.types import Model

if TYPE_CHECKING:
    from robustbench_local.data import Dataset


def check_defense(defense: Defense, network: Model, data: "Dataset") -> None:
    """Raise `UserError` where `network`, trained or not, cannot work behind the wraps.

    Two test images pass through the victim, and through what recipes train, with their gradient;
    a victim returns logits of shape (2, K). Wraps that learn something are not ready before the
    network is trained and are left out, but for their `check`; a detector that sets nothing but its
    threshold is tried with any. Leaves no trace.
    """
    for step in defense.wrap.values():
        check = getattr(step, "check", None)
        if check is not None:
            check(network)
    steps = {name: _with_threshold(step) for name, step in defense.wrap.items()}
    wraps = {name: step for name, step in steps.items() if not _learns(step)}
    if not wraps:
        return
    ready = replace(defense, wrap=wraps)
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    x = data.test.pixels(slice(0, 2)).to(device)
    for inside in (ready.apply, ready.through):
        try:
            victim = inside(network)
            if not isinstance(victim, nn.Module):
                raise UserError(
                    f"defense {ready.name} returned a {type(victim).__name__}; expected a "
                    "torch.nn.Module that takes images and returns logits"
                )
            given = x.clone()
            with pristine(victim), torch.no_grad():
                check_logits(victim(given), x, data.num_classes + abstains(victim))
            with pristine(victim), torch.enable_grad():
                victim(x.clone().requires_grad_())
        except UserError:
            raise
        except Exception as error:  # whatever somebody's code raises
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"defense {ready.name} fails in front of the network on images of shape "
                f"{tuple(x.shape)} ({type(error).__name__}: {reason}); expected logits of shape "
                f"{(len(x), data.num_classes)}: check it, and that the network takes images of the "
                "size it returns"
            ) from error
        if not torch.equal(given, x):
            raise UserError(
                f"defense {ready.name} changes the images it is given; expected new ones: begin "
                "its transform with x = x.clone()"
            )


def _with_threshold(step: Wrapper) -> Wrapper:
    return (
        replace(step, calibration=Calibration(0, 0, 0, 0)) if isinstance(step, Detector) else step
    )


def _learns(step: object) -> bool:
    nothing = (Preprocess.fit, Detector.fit)
    return getattr(type(step), "fit", Preprocess.fit) not in nothing

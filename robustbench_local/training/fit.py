"""Weights for a model: from the cache, else trained, once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robustbench_local.identity import content_id
from robustbench_local.randomness import derive_seed
from robustbench_local.training.guards import find_warnings
from robustbench_local.training.identity import key_parts
from robustbench_local.training.loop import seeded, train
from robustbench_local.training.schedule import Schedule
from robustbench_local.training.store import Shelf
from robustbench_local.types import Model

if TYPE_CHECKING:
    from rich.console import Console

    from robustbench_local.data import Dataset
    from robustbench_local.defenses.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """A trained model, and how it came about.

    `model` is in eval mode on the device asked for. `history` has one entry per epoch, `epoch`
    (from 1) is the one selected and `validation` its accuracies. `seconds` and `device` are those
    of the training itself, also where the weights were `cached`. `warnings` are sentences, each
    after a short id and a colon.
    """

    model: Model
    key: str
    history: list[dict[str, Any]]
    epoch: int
    validation: dict[str, float]
    warnings: tuple[str, ...]
    seconds: float
    cached: bool
    device: str
    sha256: str

    @classmethod
    def given(cls, model: Model, sha256: str) -> "Trained":
        """A model that came with its weights: nothing was trained."""
        return cls(model, f"checkpoint-{sha256[:16]}", [], 0, {}, (), 0.0, True, "", sha256)


def fit(
    build: Callable[[], Model],
    data: "Dataset",
    recipe: "Recipe",
    schedule: Schedule,
    *,
    seed: int,
    device: torch.device,
    cache: Path,
    key: Mapping[str, object],
    console: "Console | None" = None,
    through: Callable[[Model], Model] | None = None,
) -> Trained:
    """Train what `build` makes on `data.train`, or load it where that was done before.

    `build` returns a freshly initialised model and draws its weights from torch's global
    generator, which is seeded around it. `data` lies on `device`. `key` describes the model, see
    `weights_key`, and what it is trained `through`: a function that puts a model, whose weights it
    leaves in place, behind something, such as noise. The epoch is selected on `data.validation`;
    `data.test` is not looked at.

    A training that was killed goes on after its last whole epoch, with the same result. Two
    processes never train the same weights at the same time. On a CPU the same seed gives the same
    bytes. Raises `TrainingDiverged` where the loss is no longer a number.
    """
    parts = key_parts(data, recipe, schedule, seed=seed, key=key)
    shelf = Shelf(cache, content_id(parts))

    def fresh() -> Model:
        with seeded(derive_seed(seed, "initial"), device):
            return build().to(device)

    about, cached = shelf.find(), True
    if about is None:
        with shelf.lock(console):
            about = shelf.find(repair=True)  # a process that was waited for may have written it
            if about is None:
                training, course = train(
                    fresh(),
                    through or _plainly,
                    data,
                    recipe,
                    schedule,
                    seed=seed,
                    device=device,
                    state=shelf.state,
                    console=console,
                )
                seen = (through or _plainly)(training.average.model)
                told = find_warnings(seen, data, recipe, course)
                facts = {"parts": parts, "device": _device_name(device), "warnings": told}
                about, cached = shelf.write(course.weights, facts | course.summary()), False
            shelf.state.remove()
    else:
        shelf.state.remove()  # left by a process killed right after writing the weights
    # Also after training: what is returned is what is stored.
    model = fresh()
    model.load_state_dict(shelf.read())
    return Trained(
        model=model.eval(),
        key=shelf.key,
        history=about["history"],
        epoch=about["epoch"],
        validation=about["validation"],
        warnings=(*about["warnings"], *shelf.notes),
        seconds=about["seconds"],
        cached=cached,
        device=about["device"],
        sha256=about["sha256"],
    )


def _plainly(model: Model) -> Model:
    return model


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

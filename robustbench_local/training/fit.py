"""Weights for a model: from the cache, else trained, once."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robustbench_local import processes
from robustbench_local.identity import content_id
from robustbench_local.randomness import derive_seed
from robustbench_local.training.guards import find_warnings
from robustbench_local.training.identity import key_parts
from robustbench_local.training.loop import seeded, train
from robustbench_local.training.schedule import Schedule
from robustbench_local.training.store import Hold, LeaseLost, Shelf
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
    of the training itself, also where the weights were `cached`, and so are the `processes` that
    did it together. `warnings` are sentences, each
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
    processes: int = 1

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

    A training that was killed goes on after its last whole epoch, with the same result. Two runs
    never train the same weights at the same time. On a CPU the same seed gives the same bytes, as
    long as one process does it: several, see `processes`, add in another order. Raises
    `TrainingDiverged` where the loss is no longer a number.
    """
    parts = key_parts(data, recipe, schedule, seed=seed, key=key)
    shelf = Shelf(cache, content_id(parts))

    def fresh() -> Model:
        with seeded(derive_seed(seed, "initial"), device):
            return build().to(device)

    def train_now(hold: Hold | None) -> dict[str, Any]:
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
            check=_nothing if hold is None else hold.check,
        )
        if hold is None:
            return {}
        seen = (through or _plainly)(training.average.model)
        told = find_warnings(seen, data, recipe, course)
        facts = {
            "parts": parts,
            "device": _device_name(device),
            "processes": 1 if (group := processes.current()) is None else group.size,
            "warnings": told,
        }
        hold.check()
        return shelf.write(course.weights, facts | course.summary())

    about, cached = _from_shelf(shelf, console, train_now)
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
        processes=about.get("processes", 1),
    )


def _from_shelf(
    shelf: Shelf, console: "Console | None", train_now: Callable[[Hold | None], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """What is known about the weights, and whether they were there; else they are trained now.

    Of processes that train together one looks, holds the lock and writes.
    """
    group = processes.current()
    if group is not None and not group.leads:
        while True:
            known: dict[str, Any] | None = group.agree(lambda: None)
            if known is not None:
                return known, True
            with suppress(LeaseLost):
                train_now(None)
            made: dict[str, Any] | None = group.agree(lambda: None)
            if made is not None:
                return made, False

    def share(about: dict[str, Any] | None) -> dict[str, Any] | None:
        return about if group is None else group.agree(lambda: about)

    about = shelf.find()
    if about is not None:
        shelf.state.remove()  # left by a process killed right after writing the weights
        share(about)
        return about, True
    while True:
        with shelf.lock(console) as hold:
            about = shelf.find(repair=True)  # a process that was waited for may have written it
            if share(about) is not None:
                assert about is not None
                shelf.state.remove()
                return about, True
            try:
                about = train_now(hold)
            except LeaseLost:  # this process was stopped for so long that another one took over
                about = None
            else:
                shelf.state.remove()
            if share(about) is not None:
                assert about is not None
                return about, False


def _plainly(model: Model) -> Model:
    return model


def _nothing() -> None:
    pass


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

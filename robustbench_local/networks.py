"""The networks of a run: trained, from the cache, the user's own, and those to transfer from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robustbench_local.attacks import Transfer
from robustbench_local.data import Dataset
from robustbench_local.defenses import Defense, check_defense
from robustbench_local.defenses.preprocess import RUN_TIME
from robustbench_local.display import Display
from robustbench_local.identity import class_version, code_version, file_sha256, find_object
from robustbench_local.models import build_model, check_model, load_checkpoint, model_key
from robustbench_local.sources import get_sources
from robustbench_local.training import Schedule, Trained, Workshop


def make_workshop(
    settings: Mapping[str, Any],
    data: Dataset,
    defense: Defense,
    device: torch.device,
    cache: Path,
    display: Display,
) -> Workshop:
    """What trains every network of the run."""
    model = {**settings["model"], "checkpoint": None}
    schedule = Schedule.from_config(settings["train"])
    mixed = schedule.mixed_precision and device.type == "cuda"
    key: dict[str, object] = {
        "model": model_key(model),
        "precision": "mixed" if mixed else "float32",
    }
    if defense.trained_through:
        # In their order; undefended weights keep the key they have without.
        wraps = settings["defense"]["wrap"]
        key["through"] = [describe_part(wraps[name]) for name in defense.trained_through]
    return Workshop(
        data=data,
        device=device,
        cache=cache,
        seed=settings["seed"],
        schedule=schedule,
        build=lambda: build_model(model, data),
        model=key,
        through=defense.through if defense.trained_through else None,
        console=display.errors,
    )


def describe_part(node: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a defense as it decides weights: its code, and its settings but `run_time_only`."""
    part = find_object(str(node["_target_"]))
    ignored = getattr(part, "run_time_only", RUN_TIME)
    settings = {name: value for name, value in node.items() if name not in ignored}
    # What a part of ours does may be written in any file of its folder.
    own = str(node["_target_"]).startswith("robustbench_local.")
    return {**settings, "code": code_version("defenses") if own else class_version(part)}


def get_model(settings: Mapping[str, Any], defense: Defense, workshop: Workshop) -> Trained:
    """The user's own weights where a checkpoint is given, else trained or from the cache."""
    model, data, device = settings["model"], workshop.data, workshop.device
    if model["checkpoint"] is not None:
        file = Path(str(model["checkpoint"])).expanduser()
        network = build_model(model, data).to(device)
        load_checkpoint(network, file)
        check_model(network, data, device)
        check_defense(defense, network, data)
        return Trained.given(network.eval(), file_sha256(file))
    fresh = workshop.build()
    check_model(fresh, data, "cpu")  # before minutes are spent on it
    check_defense(defense, fresh, data)
    return workshop.classifier(defense.training_recipe.prepare(workshop))


def equip(
    attack: Transfer,
    settings: Mapping[str, Any],
    workshop: Workshop,
    victim: Trained,
    display: Display,
) -> Transfer:
    """The attack with the models it transfers from, those it trains being undefended."""
    data, device = workshop.data, workshop.device

    def train(seed: int) -> Trained:
        model = {**settings["model"], "checkpoint": None}
        own = {**settings, "seed": seed, "model": model}
        empty = make_workshop(own, data, Defense(), device, workshop.cache, display)
        return get_model(own, Defense(), empty)

    return attack.with_models(
        get_sources(attack.sources, settings, data, victim, train=train, device=device)
    )

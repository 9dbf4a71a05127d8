"""What a configuration asks for, read and checked as far as that goes without its data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from omegaconf import DictConfig, OmegaConf

from robustbench_local.attacks import Attack
from robustbench_local.building import (
    Point,
    build,
    build_attack,
    build_defense,
    build_threat,
    check_settings,
    choose_device,
    epsilons,
    ignore_defense,
)
from robustbench_local.data import Dataset, load
from robustbench_local.defenses import Defense
from robustbench_local.display import Display
from robustbench_local.evaluation.shards import Shard
from robustbench_local.results.record import run_identity
from robustbench_local.results.store import Store, check_writable
from robustbench_local.tracking import Tracker, build_tracker


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run for each of `points`, of one defended model under one attack."""

    config: DictConfig
    settings: dict[str, Any]
    defense: Defense
    attack: Attack
    points: Sequence[Point]
    device: torch.device
    cache: Path
    store: Store
    shard: Shard | None  # None: the whole test set
    tracker: Tracker | None

    @classmethod
    def read(cls, config: DictConfig, display: Display) -> Self:
        """Raises `UserError` where the configuration is wrong or a folder cannot be written."""
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        check_settings(settings)
        defense = build_defense(config.defense)
        if settings["awareness"] == "oblivious":
            ignore_defense(settings, defense, display)
        device, shard = choose_device(str(config.device)), Shard.parse(settings["shard"])
        points = [Point(build_threat(config, value)) for value in epsilons(settings)]
        attack = build_attack(settings, 1)
        for point in points:
            attack.require(point.threat)
        if defense.abstains and settings["awareness"] == "adaptive":
            attack.require_rejection()
        for part in (config.audit, config.eot):  # mistakes in them are told before any training
            build(part)
        cache, results = (Path(str(config.paths[key])).expanduser() for key in ("cache", "results"))
        store = Store(results)
        check_writable(store.records, "paths.results")
        check_writable(cache, "paths.cache")
        return cls(
            config=config,
            settings=settings,
            defense=defense,
            attack=attack,
            points=points,
            device=device,
            cache=cache,
            store=store,
            shard=shard,
            tracker=build_tracker(config.tracking),
        )

    def load(self, device: torch.device) -> Dataset:
        """Its data."""
        folder = Path(str(self.config.paths.data)).expanduser()
        return load(build(self.config.dataset), folder, self.cache, device)

    def run_ids(self, data: Dataset) -> list[str]:
        """The name of the run at each point."""
        return [
            run_identity(each.settings(self.settings), data, self.device) for each in self.points
        ]

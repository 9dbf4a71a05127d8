"""What a sweep comes to, before anything of it is started."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

from robustbench_local.cli_errors import EXPECTED
from robustbench_local.data import Dataset
from robustbench_local.defenses.detection import Detector
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.display import Display
from robustbench_local.identity import content_id
from robustbench_local.networks import describe_part, make_workshop
from robustbench_local.request import Request
from robustbench_local.results import Record, Store
from robustbench_local.results.shards import Shards
from robustbench_local.training import weights_key
from robustbench_local.training.store import Shelf


@dataclass(eq=False)
class Job:
    """What is launched as one: a run, or a curve of several.

    `run_ids` are empty where the configuration is wrong: such a job is launched to say so itself.
    `trainings` are keys, of networks and of what parts of its defense train. `labels` are what a
    record of it would say, as far as that is known.
    """

    overrides: Sequence[str]
    name: str
    store: Store
    run_ids: Sequence[str] = ()
    trainings: Sequence[str] = ()
    untrained: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    images: int = 0
    shard: str = ""
    recorded: bool = False  # the shard, of a run that is not whole yet

    @property
    def results(self) -> list[tuple[str, str]]:
        """What it leaves: whole runs, or the same part of each."""
        return [(name, self.shard) for name in self.run_ids]


@dataclass
class Plan:
    """The jobs of a sweep; those `to_launch` in the order in which they are."""

    jobs: Sequence[Job]
    to_launch: list[Job]
    records: dict[str, Record]  # that are there already, by run id
    total: int
    parts: int = 0  # shards that are recorded, of runs that are not whole yet
    forced: bool = False
    networks: int = 0
    cached: int = 0

    @property
    def recorded(self) -> int:
        """How many runs need not be launched."""
        return len(self.records) + self.parts


def make_plan(batch: Sequence[Sequence[str]], compose: Callable[[list[str]], DictConfig]) -> Plan:
    """Compose every job and find out what it is called, what it trains, what is there already.

    Raises what Hydra raises where one cannot be composed: a name that does not exist.
    """
    planner = _Planner(varying(batch))
    jobs = [planner.job(list(words), compose(list(words))) for words in batch]
    records, forced = planner.records, planner.forced
    seen, parts, to_launch = set[tuple[str, str]](), set[tuple[str, str]](), []
    for job in jobs:
        left = {result for result in job.results if result[0] not in records}
        if job.run_ids and (left <= seen or job.recorded) and len(jobs) > 1:
            parts |= left if job.recorded else set()
            continue  # recorded, or the same run as that of an earlier job
        seen |= left
        to_launch.append(job)
    total = len(seen) + len(records) + len(parts) + sum(not job.run_ids for job in jobs)
    networks = {job.trainings[0]: job.untrained for job in to_launch if job.trainings}
    return Plan(
        jobs=jobs,
        to_launch=distinct_trainings_first(to_launch),
        records=records,
        parts=len(parts),
        total=total,
        forced=forced,
        networks=len(networks),
        cached=sum(not untrained for untrained in networks.values()),
    )


def distinct_trainings_first(jobs: Sequence[Job]) -> list[Job]:
    """One job for each training, then the rest; else in their order.

    So processes side by side train different networks and do not wait for one another.
    """
    seen: set[str] = set()
    first: list[Job] = []
    rest: list[Job] = []
    for job in jobs:
        new = not seen.issuperset(job.trainings)
        seen.update(job.trainings)
        (first if new else rest).append(job)
    return first + rest


def varying(batch: Sequence[Sequence[str]]) -> set[str]:
    """The keys that do not have the same value in all jobs."""
    values: dict[str, set[str]] = {}
    for words in batch:
        for word in words:
            key, _, value = word.partition("=")
            values.setdefault(key, set()).add(value)
    return {key for key, found in values.items() if len(found) > 1}


_READ = ("dataset", "model", "train", "threat", "defense", "attack", "awareness")
"""The order in which the choices of a run are read."""


def name_job(words: Sequence[str], keys: set[str], groups: Sequence[str]) -> str:
    """What tells a job from the others: choices by their names, other keys with their values.

    The names come first, the victim's before the attack's, then the rest as it was typed.
    """
    named = [*_READ, *(group for group in groups if group not in _READ)]
    told: list[tuple[int, str]] = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in keys:
            continue
        if key == "defense":
            value = value.strip("[]").replace(",", "+")
        place = named.index(key) if key in named else len(named)
        told.append((place, value if key in named else f"{key.rpartition('.')[2]}={value}"))
    return ", ".join(text for _, text in sorted(told, key=lambda each: each[0])) or ", ".join(words)


class _Planner:
    """Reads configurations; data sets that several share are loaded once."""

    def __init__(self, keys: set[str]) -> None:
        self.keys = keys
        self.data: dict[str, Dataset] = {}
        self.stores: dict[Path, dict[str, Record | None]] = {}
        self.records: dict[str, Record] = {}
        self.forced = False
        self.display = Display(live=False, said=set())
        self.display.errors.quiet = True  # each job says for itself what there is to say

    def job(self, words: list[str], config: DictConfig) -> Job:
        groups = list(config.hydra.runtime.choices)
        chosen = dict(config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        store = Store(Path(str(config.paths.results)).expanduser())
        job = Job(words, name_job(words, self.keys, groups), store)
        try:
            request = Request.read(config, self.display)
            data = self._load(request)
            job.run_ids = request.run_ids(data)
        except (*EXPECTED, OSError):
            return job  # launched, it says so itself
        except Exception:  # of somebody's own class
            return job
        job.labels = {
            "dataset": data.name,
            "model": str(chosen.get("model")),
            "defense": request.defense.name,
            "attack": str(chosen.get("attack")),
            "awareness": request.settings["awareness"],
        }
        job.images = len(data.test)
        if request.shard is not None:
            job.shard, job.images = str(request.shard), len(data.test) // request.shard.of
            shards = Shards(store, request.shard, request.attack.fold, again=bool(config.force))
            for name in job.run_ids:  # folded now where the last one was killed before it could
                shards.find(name)
            job.recorded = shards.have(job.run_ids)
        job.trainings, job.untrained = trainings(request, data)
        self._look_up(job, forced=bool(config.force))
        return job

    def _load(self, request: Request) -> Dataset:
        key = json.dumps([request.settings["dataset"], request.settings["paths"]["data"]])
        if key not in self.data:
            self.data[key] = request.load(torch.device("cpu"))
        return self.data[key]

    def _look_up(self, job: Job, *, forced: bool) -> None:
        self.forced = self.forced or forced
        if forced:
            return
        for name in job.run_ids:
            if name not in self.records and (record := job.store.find(name)):
                self.records[name] = record


def trainings(request: Request, data: Dataset) -> tuple[list[str], bool]:
    """The keys of what a run trains, and whether its network is not in the cache yet.

    The first is that of the network, the others belong to parts of the defense that train.
    """
    settings, defense = request.settings, request.defense
    if settings["model"]["checkpoint"] is not None:
        return [], False
    display = Display(live=False)
    workshop = make_workshop(settings, data, defense, request.device, request.cache, display)
    schedule, seed = workshop.schedule, workshop.seed
    key = weights_key(data, defense.training_recipe, schedule, seed=seed, key=workshop.model)
    keys = [key]
    for name, part in defense.wrap.items():
        if _trains(part):
            about = describe_part(settings["defense"]["wrap"][name])
            keys.append(content_id({"part": about, "network": key}))
    return keys, Shelf(request.cache, key).find() is None


def _trains(part: object) -> bool:
    """Whether a part of a defense has a `fit` of its own, which trains something."""
    own = getattr(type(part), "fit", None)
    return own is not None and own not in (Preprocess.fit, Detector.fit)

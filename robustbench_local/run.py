"""One run, as a straight line: load, train, defend, attack, judge, audit, record, tabulate."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from robustbench_local.attacks import Attack, Transfer
from robustbench_local.attacks.samples import leaves_samples_open, with_samples
from robustbench_local.data import Dataset, load
from robustbench_local.defenses import (
    Defense,
    check_defense,
    declared_samples,
    describe_detection,
)
from robustbench_local.defenses.preprocess import RUN_TIME
from robustbench_local.display import Display
from robustbench_local.errors import UserError
from robustbench_local.evaluation import (
    Audit,
    Judging,
    audit_attack,
    audit_victim,
    evaluate_curve,
    exact,
    is_random,
    raise_samples,
)
from robustbench_local.identity import class_version, code_version, file_sha256, find_object
from robustbench_local.models import build_model, check_model, load_checkpoint, model_key
from robustbench_local.oracle import Oracle
from robustbench_local.results import Record, Store, write_leaderboard
from robustbench_local.results.curve import draw_curve
from robustbench_local.results.labels import choice_label
from robustbench_local.results.record import make_record, run_identity
from robustbench_local.results.report import show
from robustbench_local.results.store import check_writable
from robustbench_local.sources import get_sources
from robustbench_local.threat import ThreatModel, parse_epsilon
from robustbench_local.training import Schedule, Trained, Workshop


def run_from_hydra(config: DictConfig) -> list[Record]:
    """`run` for a configuration that Hydra composed; its choices give the names of the row."""
    runtime = HydraConfig.get().runtime
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    return run(config, Choices(dict(runtime.choices), tuple(folders)))


@dataclass(frozen=True)
class Choices:
    """Which file was chosen in each group, and the folders those files lie in."""

    chosen: Mapping[str, str]
    folders: Sequence[Path]


def run(config: DictConfig, choices: Choices) -> list[Record]:
    """Evaluate one defended model under one attack; one record for each `threat.epsilon`.

    What is recorded already is shown from its record unless `config.force`. Raises `UserError`
    before anything is recorded where the configuration, the data, the model or the folders are
    wrong.
    """
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    check_settings(settings)
    display = Display()
    defense = build_defense(config.defense)
    if settings["awareness"] == "oblivious":
        ignore_defense(settings, defense, display)
    device = choose_device(str(config.device))
    points = [Point(build_threat(config, value)) for value in epsilons(settings)]
    attack = build_attack(settings, 1)
    for point in points:
        attack.require(point.threat)
    if defense.abstains and settings["awareness"] == "adaptive":
        attack.require_rejection()
    auditing: Audit = build(config.audit)
    data_dir, cache, results = (
        Path(str(config.paths[key])).expanduser() for key in ("data", "cache", "results")
    )
    store = Store(results)
    check_writable(store.records, "paths.results")
    check_writable(cache, "paths.cache")

    data = load(build(config.dataset), data_dir, cache, device)
    for point in points:
        attack.check(data, point.threat)
    run_ids = [run_identity(point.settings(settings), data, device) for point in points]
    known = {} if config.force else {name: store.find(name) for name in run_ids}
    records: dict[str, Record] = {name: record for name, record in known.items() if record}
    missing = {n: point for n, point in zip(run_ids, points, strict=True) if n not in records}
    recorded = len(records)
    if missing:
        workshop = make_workshop(settings, data, defense, device, cache, display)
        trained = get_model(settings, defense, workshop)
        defense = defense.fit(replace(workshop, network=trained))
        victim = defense.apply(trained.model)
        at_once = config.batch_size
        with exact():
            # Seen, not only declared: a network of the user's own may be random without saying so.
            randomized = defense.randomized(victim) or is_random(
                victim, data, config=auditing, at_most=at_once
            )
        threats = [point.threat for point in missing.values()]
        if settings["awareness"] == "oblivious":
            oracle = Oracle(trained.model, threats[0], data.num_classes)
        else:
            oracle = Oracle(victim, threats[0], data.num_classes, randomized=randomized)
        judging = Judging(
            victim=victim,
            draws=config.judge_draws if randomized else 1,
            seed=config.seed,
            reseed=defense.reseeder(victim),
        )
        averaged = None
        if oracle.randomized and leaves_samples_open(settings["attack"]):
            averaged = raise_samples(
                oracle,
                lambda samples: build_attack(settings, samples),
                data.test,
                declared_samples(victim),
                build(config.eot),
                batch_size=config.batch_size,
                judging=judging,
            )
            attack = build_attack(settings, averaged.samples)
        if isinstance(attack, Transfer):
            attack = equip(attack, settings, data, trained, device, cache, display)
        with exact():
            checks = audit_victim(
                victim,
                data,
                attack,
                config=auditing,
                awareness=settings["awareness"],
                at_most=at_once,
            )
            attack = attack.fit(oracle, data.validation, threats[-1])
        preparation = {"forward": oracle.forward_passes, "backward": oracle.backward_passes}
        with display.evaluation(choices.chosen["attack"], len(data.test)) as progress:
            curve = evaluate_curve(
                oracle,
                attack,
                data.test,
                [threat.epsilon for threat in threats],
                batch_size=config.batch_size,
                judging=judging,
                progress=progress,
                say=display.say,
            )
        certified = None
        if threats[0].norm == "l2":
            looked_at = min(defense.certified_images or len(data.test), len(data.test))
            bar = display.evaluation("certificate", looked_at, accuracy="certified")
            with bar as progress, exact():
                certified = defense.certify(victim, data.test, seed=config.seed, progress=progress)
        if auditing.level == "full":
            display.say(f"audit: every check on {min(auditing.sample, len(data.test))} images")
        for (run_id, point), outcomes in zip(missing.items(), curve, strict=True):
            tried = audit_attack(
                oracle,
                attack,
                data.test,
                point.threat,
                config=auditing,
                judging=judging,
                batch_size=outcomes.batch_size,
                sources={"the bare network": trained.model} if defense.faced else {},
            )
            records[run_id] = make_record(
                run_id=run_id,
                settings=point.settings(settings),
                labels=name_row(config, settings, choices, data, defense, point.threat),
                data=data,
                threat=point.threat,
                trained=trained,
                outcomes=outcomes,
                report=attack.report(point.threat),
                preparation=preparation,
                averaged=None if averaged is None else asdict(averaged),
                calibration=describe_detection(victim),
                judge_draws=judging.draws,
                certified=certified,
                learned=defense.learned,
                checks=[*checks, *tried],
                device=device,
            )
            store.add(records[run_id], outcomes.examples)
    leaderboard = write_leaderboard(store)
    finished = [records[run_id] for run_id in run_ids]
    show(finished, display.output, leaderboard=leaderboard, recorded=recorded)
    if len(finished) > 1:
        display.output.print(f"curve: {draw_curve(store, finished)}", soft_wrap=True)
    return finished


def ignore_defense(settings: dict[str, Any], defense: Defense, display: Display) -> None:
    """Set up an attack that does not know the defense, in place; adaptive where that is no less."""
    if not defense.faced:
        settings["awareness"] = "adaptive"
        display.say(
            f"awareness=oblivious is the same as adaptive: defense {defense.name} puts nothing in "
            "front of the network that an attack could ignore"
        )
    elif "early_stop" in settings["attack"]:
        # The first point that breaks the bare network says little about what is in front of it.
        settings["attack"]["early_stop"] = False


@dataclass(frozen=True)
class Point:
    """One epsilon of a run."""

    threat: ThreatModel

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of this epsilon alone, so that its record is that of a single run.

        However it was written: 8/255 and its value are the same run.
        """
        return {**settings, "threat": {**settings["threat"], "epsilon": self.threat.epsilon}}


def epsilons(settings: Mapping[str, Any]) -> list[float]:
    """The radii of `threat.epsilon`, one or a list. Raises `UserError` for an empty list."""
    given = settings["threat"]["epsilon"]
    values = given if isinstance(given, list) else [given]
    if not values:
        raise UserError(
            "threat.epsilon=[] holds no radius; type for example threat.epsilon=[0.1,0.2,0.3]"
        )
    return sorted(set(map(parse_epsilon, values)))


def build_threat(config: DictConfig, epsilon: float) -> ThreatModel:
    """The threat model at one radius."""
    threat: ThreatModel = build(OmegaConf.merge(config, {"threat": {"epsilon": epsilon}}).threat)
    return threat


def build_attack(settings: Mapping[str, Any], samples: int) -> Attack:
    """The attack of resolved settings, averaging so many draws where `eot_samples` is null."""
    node = OmegaConf.create({"attack": with_samples(settings["attack"], samples)})
    attack: Attack = build(node.attack)
    return attack


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `UserError` where a key beside the groups holds the wrong kind of value."""
    for key, least in (("seed", 0), ("batch_size", 1), ("judge_draws", 1)):
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(
                f"{key}={value} is not a whole number from {least}; type for example "
                f"{key}={max(least, 10)}"
            )
    if settings["awareness"] not in ("adaptive", "oblivious"):
        raise UserError(
            f"awareness={settings['awareness']} is unknown; expected adaptive (the attack faces "
            "the defense) or oblivious (it ignores what is in front of the network)"
        )


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises `UserError` for one that is not there."""
    found = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < found):
        return device
    raise UserError(
        f"device={name} is not there; expected auto, cpu or one of {found} CUDA devices: type "
        "device=auto"
    )


def build(node: DictConfig) -> Any:
    """Instantiate a group of the configuration; its errors are told as the user's own."""
    try:
        return instantiate(node, _convert_="object")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError | TypeError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected .* '(\w+)'", str(cause))
        if unknown is None:
            raise
        group = node._get_full_key(None)
        raise UserError(
            f"{group}.{unknown[2]} is not a key of {unknown[1]}; expected one of "
            f"{', '.join(key for key in map(str, node) if key not in ('_target_', unknown[2]))}: "
            f"type {group}.KEY=VALUE"
        ) from None


def build_defense(node: DictConfig) -> Defense:
    """All its parts; anything else in the group is a `UserError`."""
    parts = ("recipe", "wrap", "regularize")
    unknown = sorted(set(map(str, node)) - set(parts))
    if unknown:
        raise UserError(
            f"defense.{unknown[0]} is not a key of a defense; expected recipe, wrap and "
            "regularize: type +defense.recipe.NAME, +defense.wrap.NAME or +defense.regularize.NAME"
        )
    return Defense(**{part: build(node[part]) for part in parts})


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
    data: Dataset,
    victim: Trained,
    device: torch.device,
    cache: Path,
    display: Display,
) -> Transfer:
    """The attack with the models it transfers from, those it trains being undefended."""

    def train(seed: int) -> Trained:
        model = {**settings["model"], "checkpoint": None}
        own = {**settings, "seed": seed, "model": model}
        workshop = make_workshop(own, data, Defense(), device, cache, display)
        return get_model(own, Defense(), workshop)

    return attack.with_models(
        get_sources(attack.sources, settings, data, victim, train=train, device=device)
    )


def name_row(
    config: DictConfig,
    settings: Mapping[str, Any],
    choices: Choices,
    data: Dataset,
    defense: Defense,
    threat: ThreatModel,
) -> dict[str, Any]:
    """The names under which the run appears in tables, see `results.leaderboard.ROW`."""

    def named(group: str, choice: str) -> str:
        return choice_label(config, group, choice, choices.folders)

    model, train = named("model", choices.chosen["model"]), named("train", choices.chosen["train"])
    checkpoint = config.model.checkpoint
    if checkpoint is not None:
        # Two files may have the same name: the hash tells them apart.
        file = Path(str(checkpoint)).expanduser()
        model, train = f"{model}-{file.stem}-{file_sha256(file)[:8]}", "checkpoint"
    defenses = [named("defense", name) for name in defense.names]
    return {
        "dataset": data.name,
        "model": model,
        "train": train,
        "defense": "+".join(defenses) or defense.name,
        "attack": named("attack", choices.chosen["attack"]),
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "access": threat.access,
        "awareness": settings["awareness"],
    }

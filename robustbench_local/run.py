"""One run, as a straight line: load, train, defend, attack, judge, audit, record, tabulate."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from robustbench_local.attacks import Attack, Transfer
from robustbench_local.attacks.samples import leaves_samples_open
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
from robustbench_local.defenses import (
    Defense,
    declared_samples,
    describe_detection,
)
from robustbench_local.display import Display
from robustbench_local.evaluation import (
    Audit,
    Averaging,
    Judging,
    Samples,
    audit_attack,
    audit_samples,
    audit_victim,
    evaluate_curve,
    exact,
    is_random,
    raise_samples,
)
from robustbench_local.identity import file_sha256
from robustbench_local.networks import equip, get_model, make_workshop
from robustbench_local.oracle import Oracle
from robustbench_local.results import Record, Store, write_leaderboard
from robustbench_local.results.curve import draw_curve
from robustbench_local.results.labels import choice_label
from robustbench_local.results.record import make_record, run_identity
from robustbench_local.results.report import show
from robustbench_local.results.store import check_writable
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Trained
from robustbench_local.types import Model


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
    attack, averaging = build_attack(settings, 1), build(config.eot)
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
        first = next(iter(missing.values())).threat
        faced, judging = face(settings, data, defense, victim, trained, first, auditing)
        # Together, radii would share the draws of a random victim and how many are averaged.
        apart = judging.randomized or faced.randomized
        groups = [{name: point} for name, point in missing.items()] if apart else [missing]
        certified: Mapping[str, Any] | None = None
        for group in groups:
            threats = [point.threat for point in group.values()]
            oracle = Oracle(faced.victim, threats[0], data.num_classes, randomized=faced.randomized)
            ready, averaged = settle_draws(attack, settings, averaging, oracle, judging, data)
            if isinstance(ready, Transfer):
                ready = equip(ready, settings, data, trained, device, cache, display)
            with exact():
                checks = audit_victim(
                    victim,
                    data,
                    ready,
                    config=auditing,
                    awareness=settings["awareness"],
                    at_most=config.batch_size,
                )
                ready = ready.fit(oracle, data.validation, threats[-1])
            checks.append(audit_samples(averaged))
            preparation = {"forward": oracle.forward_passes, "backward": oracle.backward_passes}
            with display.evaluation(choices.chosen["attack"], len(data.test)) as progress:
                curve = evaluate_curve(
                    oracle,
                    ready,
                    data.test,
                    [threat.epsilon for threat in threats],
                    batch_size=config.batch_size,
                    judging=judging,
                    progress=progress,
                    say=display.say,
                )
            certified = certified or prove(defense, victim, data, first, config.seed, display)
            if auditing.level == "full":
                display.say(f"audit: every check on {min(auditing.sample, len(data.test))} images")
            for (run_id, point), outcomes in zip(group.items(), curve, strict=True):
                tried = audit_attack(
                    oracle,
                    ready,
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
                    report=ready.report(point.threat),
                    preparation=preparation,
                    averaged=None if averaged is None else asdict(averaged),
                    calibration=describe_detection(victim),
                    judging=judging,
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


def face(
    settings: Mapping[str, Any],
    data: Dataset,
    defense: Defense,
    victim: Model,
    trained: Trained,
    threat: ThreatModel,
    auditing: Audit,
) -> tuple[Oracle, Judging]:
    """Whom the attack faces, and how the judge looks at the victim."""

    def draws(model: Model) -> bool:
        # Seen, not only declared: a network of the user's own may be random without saying so.
        at_most = settings["batch_size"]
        return defense.randomized(model) or is_random(model, data, config=auditing, at_most=at_most)

    with exact():
        judged = draws(victim)
        faced = trained.model if settings["awareness"] == "oblivious" else victim
        randomized = judged if faced is victim else draws(faced)
    return Oracle(faced, threat, data.num_classes, randomized=randomized), Judging(
        victim=victim,
        draws=settings["judge_draws"] if judged else 1,
        seed=settings["seed"],
        reseed=defense.reseeder(victim),
        randomized=judged,
    )


def settle_draws(
    attack: Attack,
    settings: Mapping[str, Any],
    averaging: Averaging,
    oracle: Oracle,
    judging: Judging,
    data: Dataset,
) -> tuple[Attack, Samples | None]:
    """The attack with as many draws averaged as a random victim asks for, where it is open."""
    if not (oracle.randomized and leaves_samples_open(settings["attack"])):
        return attack, None
    averaged = raise_samples(
        oracle,
        lambda samples: build_attack(settings, samples),
        data.test,
        declared_samples(oracle.victim),
        averaging,
        batch_size=settings["batch_size"],
        judging=judging,
    )
    return build_attack(settings, averaged.samples), averaged


def prove(
    defense: Defense, victim: Model, data: Dataset, threat: ThreatModel, seed: int, display: Display
) -> Mapping[str, Any] | None:
    """What the defense certifies, which is about l2 and shown beside attacks under l2 only."""
    if threat.norm != "l2":
        return None
    images = min(defense.certified_images or len(data.test), len(data.test))
    bar = display.evaluation("certificate", images, accuracy="certified")
    with bar as progress, exact():
        return defense.certify(victim, data.test, seed=seed, progress=progress)


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

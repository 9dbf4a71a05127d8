"""One run, as a straight line: load, train, defend, attack, judge, audit, record, tabulate."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from robustbench_local.attacks import Attack, Transfer
from robustbench_local.attacks.samples import leaves_samples_open
from robustbench_local.building import Point, build, build_attack, check_chosen
from robustbench_local.data import Dataset
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
    Outcomes,
    Samples,
    audit_attack,
    audit_samples,
    audit_victim,
    evaluate_curve,
    exact,
    is_random,
    raise_samples,
)
from robustbench_local.evaluation.evaluate import now
from robustbench_local.evaluation.shards import Shard
from robustbench_local.identity import file_sha256
from robustbench_local.networks import equip, get_model, make_workshop
from robustbench_local.oracle import Oracle
from robustbench_local.processes import agree, leads, together
from robustbench_local.request import Request
from robustbench_local.results import Record, write_leaderboard
from robustbench_local.results.curve import draw_curve
from robustbench_local.results.labels import choice_label
from robustbench_local.results.record import make_record
from robustbench_local.results.report import show
from robustbench_local.results.shards import Shards, check_batches, show_parts
from robustbench_local.sweep import SAID
from robustbench_local.threat import ThreatModel
from robustbench_local.tracking import track
from robustbench_local.training import Trained, Workshop
from robustbench_local.types import Model


def run_from_hydra(config: DictConfig, *, silent: bool = False, live: bool = True) -> list[Record]:
    """`run` for a configuration that Hydra composed; its choices give the names of the row."""
    hydra = HydraConfig.get()
    check_chosen(hydra.overrides.task)
    runtime = hydra.runtime
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    choices = Choices(dict(runtime.choices), tuple(folders))
    return run(config, choices, said=SAID, silent=silent, live=live)


@dataclass(frozen=True)
class Choices:
    """Which file was chosen in each group, and the folders those files lie in.

    Of a record that is made again they are not known, but the names of its row, `labels`, are.
    """

    chosen: Mapping[str, str]
    folders: Sequence[Path]
    labels: Mapping[str, Any] | None = None


def run(
    config: DictConfig,
    choices: Choices,
    *,
    said: set[str] | None = None,
    silent: bool = False,
    live: bool = True,
) -> list[Record]:
    """Evaluate one defended model under one attack; one record for each `threat.epsilon`.

    What is recorded already is shown from its record unless `config.force`; notes about the data
    that are in `said` are not printed again, and the others join them. Of a `shard` that is not the
    last one there is no record yet. A `silent` run, of a sweep, leaves its records and no more: no
    table, no leaderboard. Bars are shown where it is `live`. Raises `UserError` before anything is
    recorded where the configuration, the data, the model or the folders are wrong.
    """
    display = Display(live=live, said=said if silent else None)
    request = Request.read(config, display)
    settings, defense, attack = request.settings, request.defense, request.attack
    points, device, cache, store = request.points, request.device, request.cache, request.store
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    data = request.load(device)
    for point in points:
        attack.check(data, point.threat)
    shard, shards = request.shard, None
    if shard is not None:
        check_batches(shard, attack, points, len(data.test), settings["batch_size"])
        shards = Shards(store, shard, attack.fold, again=config.force)
    run_ids = request.run_ids(data)
    find = store.find if shards is None else shards.find
    known = {} if config.force else {name: find(name) for name in run_ids}
    records: dict[str, Record] = {name: record for name, record in known.items() if record}
    missing = {n: point for n, point in zip(run_ids, points, strict=True) if n not in records}
    recorded = len(records)
    measured_now = agree(lambda: bool(missing) and not (shards and shards.have(missing)))
    if measured_now:
        workshop = make_workshop(settings, data, defense, device, cache, display)
        with together(device):
            trained = get_model(settings, defense, workshop)
            defense = defense.fit(replace(workshop, network=trained))
    if not leads():  # the rest is not for several processes
        return []
    if measured_now:
        bench = set_up(config, settings, choices, workshop, trained, defense, display, shard)
        # Together, radii would share the draws of a random victim and how many are averaged.
        groups = [{name: point} for name, point in missing.items()] if bench.random else [missing]
        for group in groups:
            if shards and shards.have(group):
                continue
            for record, outcomes in measure(bench, attack, group):
                if shards is None:
                    store.add(record, outcomes.examples)
                    records[record["run_id"]] = record
                elif whole := shards.add(record, outcomes):
                    records[record["run_id"]] = whole
    finished = [records[name] for name in run_ids if name in records]
    parts = [name for name in run_ids if name not in records]  # of runs that are not whole yet
    if shards and parts and not silent:
        show_parts(shards, parts, display.output, measured_now=measured_now)
    if finished and not silent:
        leaderboard = write_leaderboard(store)
        if not parts:
            show(finished, display.output, leaderboard=leaderboard, recorded=recorded, said=said)
        if len(finished) > 1 and not parts:
            display.output.print(f"curve: {draw_curve(store, finished)}", soft_wrap=True)
    track(request.tracker, finished, store.folder, cache, display)
    return finished


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A defended model and everything that its attacks, under any threat model, have in common."""

    config: DictConfig
    settings: Mapping[str, Any]
    choices: Choices
    workshop: Workshop
    trained: Trained
    defense: Defense  # with what it has learned
    victim: Model
    faced: Model  # by the attack: the victim, or the bare network
    faced_is_random: bool
    judging: Judging
    auditing: Audit
    certified: Mapping[str, Any] | None
    display: Display
    shard: Shard | None  # None: the whole test set

    @property
    def random(self) -> bool:
        """Whether forward passes of the victim, or of what is attacked, differ."""
        return self.faced_is_random or self.judging.randomized

    @property
    def first(self) -> bool:
        """Whether to do what is done once for all shards, and leaves no trace in the others."""
        return self.shard is None or self.shard.first


def set_up(
    config: DictConfig,
    settings: Mapping[str, Any],
    choices: Choices,
    workshop: Workshop,
    trained: Trained,
    defense: Defense,
    display: Display,
    shard: Shard | None = None,
) -> Bench:
    """Put the defense on, see whom the attack faces, and what the defense proves."""
    data, auditing = workshop.data, build(config.audit)
    victim = defense.apply(trained.model)
    faced = trained.model if settings["awareness"] == "oblivious" else victim

    def draws(model: Model) -> bool:
        # Seen, not only declared: a network of the user's own may be random without saying so.
        at_most = settings["batch_size"]
        return defense.randomized(model) or is_random(model, data, config=auditing, at_most=at_most)

    with exact():
        judged = draws(victim)
        faced_is_random = judged if faced is victim else draws(faced)
    return Bench(
        config=config,
        settings=settings,
        choices=choices,
        workshop=workshop,
        trained=trained,
        defense=defense,
        victim=victim,
        faced=faced,
        faced_is_random=faced_is_random,
        judging=Judging(
            victim=victim,
            draws=settings["judge_draws"] if judged else 1,
            seed=settings["seed"],
            reseed=defense.reseeder(victim),
            randomized=judged,
        ),
        auditing=auditing,
        certified=prove(defense, victim, data, config, display)
        if shard is None or shard.first
        else None,
        display=display,
        shard=shard,
    )


def measure(
    bench: Bench, attack: Attack, points: Mapping[str, Point]
) -> Iterator[tuple[Record, Outcomes]]:
    """Attack, judge, audit: a record for each point, by its run id, and what befell each image.

    Of a shard both are about its images, but for what looks at a sample of the whole test set: how
    many draws are averaged, which every shard finds out alike, and the checks, made by the first.
    """
    config, settings, display = bench.config, bench.settings, bench.display
    data, device = bench.workshop.data, bench.workshop.device
    judging, auditing = bench.judging, bench.auditing
    threats = [point.threat for point in points.values()]
    oracle = Oracle(bench.faced, threats[0], data.num_classes, randomized=bench.faced_is_random)
    judging.restart("preparation")
    began = now(device)
    attack, averaged = settle_draws(attack, settings, build(config.eot), oracle, judging, data)
    if isinstance(attack, Transfer):
        attack = equip(attack, settings, bench.workshop, bench.trained, display)
    waited = now(device) - began
    checks = [audit_samples(averaged)]
    with exact():
        if bench.first:
            looks = audit_victim(
                bench.victim,
                data,
                attack,
                config=auditing,
                awareness=settings["awareness"],
                faced_is_random=bench.faced_is_random,
                at_most=config.batch_size,
            )
            checks = [*looks, *checks]
        judging.restart("fit")
        began = now(device)
        attack = attack.fit(oracle, data.validation, threats[-1])
        waited += now(device) - began
    preparation = {"forward": oracle.forward_passes, "backward": oracle.backward_passes}
    label, images = bench.choices.chosen["attack"], len(data.test)
    if bench.shard is not None:
        label, images = f"{label}, shard {bench.shard}", -(-images // bench.shard.of)
    with display.evaluation(label, images) as progress:
        curve = evaluate_curve(
            oracle,
            attack,
            data.test,
            [threat.epsilon for threat in threats],
            batch_size=config.batch_size,
            judging=judging,
            progress=progress,
            say=display.say,
            shard=bench.shard,
        )
    if auditing.level == "full" and bench.first:
        display.say(f"audit: every check on {min(auditing.sample, len(data.test))} images")
    for (run_id, point), outcomes in zip(points.items(), curve, strict=True):
        tried = (
            []
            if not bench.first
            else audit_attack(
                oracle,
                attack,
                data.test,
                point.threat,
                config=auditing,
                judging=judging,
                batch_size=outcomes.batch_size,
                sources={"the bare network": bench.trained.model} if bench.defense.faced else {},
            )
        )
        record = make_record(
            run_id=run_id,
            settings=point.settings(settings),
            labels=name_row(bench, point.threat),
            data=data,
            threat=point.threat,
            trained=bench.trained,
            outcomes=outcomes,
            report=attack.report(point.threat),
            preparation=preparation,
            preparation_seconds=waited,
            averaged=None if averaged is None else asdict(averaged),
            calibration=describe_detection(bench.victim),
            judging=judging,
            certified=bench.certified,
            learned=bench.defense.learned,
            checks=[*checks, *tried],
            device=device,
        )
        yield record, outcomes


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
    defense: Defense, victim: Model, data: Dataset, config: DictConfig, display: Display
) -> Mapping[str, Any] | None:
    """What the defense certifies, which is about l2 and shown beside attacks under l2 only."""
    if config.threat.norm != "l2":
        if defense.certifies:
            display.say(
                f"no certificate under {config.threat.norm}: what the defense proves is about l2; "
                "type threat=DATASET_l2, for example threat=mnist_l2"
            )
        return None
    images = min(defense.certified_images or len(data.test), len(data.test))
    bar = display.evaluation("certificate", images, accuracy="certified")
    with bar as progress, exact():
        return defense.certify(victim, data.test, seed=config.seed, progress=progress)


def name_row(bench: Bench, threat: ThreatModel) -> dict[str, Any]:
    """The names under which the run appears in tables, see `results.leaderboard.ROW`."""
    config, choices, defense = bench.config, bench.choices, bench.defense
    if choices.labels is not None:
        return dict(choices.labels)

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
        "dataset": bench.workshop.data.name,
        "model": model,
        "train": train,
        "defense": "+".join(defenses) or defense.name,
        "attack": named("attack", choices.chosen["attack"]),
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "access": threat.access,
        "awareness": bench.settings["awareness"],
    }

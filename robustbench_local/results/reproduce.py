"""A record made again from what it says of itself, and compared number by number."""

import inspect
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from robustbench_local.__main__ import CONF
from robustbench_local.cli_errors import EXPECTED, sentence
from robustbench_local.display import output
from robustbench_local.errors import UserError
from robustbench_local.evaluation import PerExample
from robustbench_local.identity import find_object
from robustbench_local.results.agreement import compare_records, tell
from robustbench_local.results.finding import one_record
from robustbench_local.results.report import print_title, radius_in_words
from robustbench_local.results.store import Record, Store
from robustbench_local.results.summary import victim_of

_AROUND = frozenset({"force", "shard", "threads", "tracking"})
"""Settings that no number depends on and records do not hold: filled without a word."""


def reproduce(results: Path, word: str, *, data: Path, cache: Path, changes: Sequence[str]) -> int:
    """Run a record again, by its run id or file, and say for every number whether it agrees."""
    store, record = _found(results, word)
    recorded = store.examples(record["run_id"])
    config, notes = stored_config(record, changes)
    console, errors = output(), Console(stderr=True)
    labels = record["labels"]
    told = (
        f"run {record['run_id']}: {labels['dataset']}, {labels['model']}, defense "
        f"{labels['defense']}, attack {labels['attack']}, {labels['norm']} "
        f"{radius_in_words(labels['epsilon'])}, seed {record['seed']}"
    )
    print_title(told, console)
    for note in notes:
        errors.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True, highlight=False)
    trained = any(cache.expanduser().rglob(f"{record['weights']['key']}*"))
    radii = radii_of(store, record)
    with _threads(record.get("environment", {}).get("threads")):
        again, examples = _run(config, labels, data, cache, radii)
    alone = len(radii) == 1 and record.get("radii_at_once", 1) > 1
    outcome = compare_records(record, again, recorded, examples, alone=alone)
    tell(outcome, record, again, console)
    if trained:
        told = f"its weights lay in {cache} and were not trained again; --cache DIR trains them too"
        console.print(told, markup=False, soft_wrap=True, highlight=False)
    return outcome.exit_code


def _found(results: Path, word: str) -> tuple[Store, Record]:
    file = Path(word).expanduser()
    if file.suffix != ".json" and len(file.parts) == 1:
        return (store := Store(results)), one_record(store, word)
    if not file.is_file():
        raise UserError(
            f"{word} is not there; expected a run id or the file of a record: type for example "
            "reproduce results/reference/records/RUN_ID.json"
        )
    if file.absolute().parent.name != "records":
        raise UserError(
            f"{word} lies in no folder called records; expected RESULTS/records/RUN_ID.json with "
            "its .npz beside it: type the file where it was recorded"
        )
    store = Store(file.absolute().parents[1])
    return store, one_record(store, file.with_suffix("").name)


def radii_of(store: Store, record: Record) -> list[float]:
    """The radii that were attacked together with that of a record, its own among them.

    They share passes over a network, and a minimum-norm attack is one search for all. Its own alone
    where the store does not hold the records of exactly so many.
    """
    own, count = record["config"]["threat"]["epsilon"], record.get("radii_at_once", 1)
    if count == 1:
        return [own]
    radii = {
        other["config"]["threat"]["epsilon"]
        for other in store.all()
        if _but_radius(other) == _but_radius(record)
    }
    return sorted(radii) if len(radii) == count else [own]


def _but_radius(record: Record) -> dict[str, Any]:
    """What runs at several radii that were attacked together have in common."""
    config = {key: value for key, value in record["config"].items() if key != "force"}
    threat = {key: value for key, value in config["threat"].items() if key != "epsilon"}
    return {
        "config": {**config, "threat": threat},
        "labels": {key: value for key, value in record["labels"].items() if key != "epsilon"},
        "weights": victim_of(record),
        "radii_at_once": record.get("radii_at_once"),
    }


def stored_config(record: Record, changes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a record for the code of today, and what had to be done to it.

    Keys that are newer than the record get their defaults; those that are not known any more are
    left out. `changes` are overrides, `KEY=VALUE`.
    """
    from omegaconf import OmegaConf

    config: dict[str, Any] = json.loads(json.dumps(record["config"]))
    changed: Any = OmegaConf.create(config)
    for change in changes:
        key, is_set, _ = change.partition("=")
        if not is_set or key.partition(".")[0] not in config:
            raise UserError(
                f"--set {change} sets nothing; expected KEY=VALUE with a key of the record's "
                "configuration: type for example --set dataset.path=FILE"
            )
        changed.merge_with_dotlist([change])
    config = json.loads(json.dumps(OmegaConf.to_container(changed)))
    notes: list[str] = []
    template = _template(config)
    for place, node, known in (
        ("", config, template),
        ("train.", config["train"], template["train"]),
    ):
        for key in sorted(set(node) - set(known)):
            del node[key]
            notes.append(f"{place}{key} is a key that is not known any more: it is left out")
    # Older than audits: it holds no finding of one to compare, and a full one takes long.
    if "audit" not in config:
        template["audit"] = {**template["audit"], "level": record["audit"]["level"]}
    _fill(config, template, "", notes)
    _drop_unknown(config, "", notes)
    return config, notes


def _template(config: Mapping[str, Any]) -> dict[str, Any]:
    """What this version composes for the same choices, which are found by their classes."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    overrides = []
    for group in ("dataset", "model", "attack", "audit"):
        name = _nearest(CONF / group, config.get(group, {}))
        overrides += [f"{group}={name}"] if name else []
    parts = [
        name
        for kind in ("recipe", "regularize", "wrap")
        for name in config.get("defense", {}).get(kind, {})
        if (CONF / "defense" / f"{name}.yaml").is_file()
    ]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            composed = compose("config", [*overrides, f"defense=[{','.join(parts) or 'none'}]"])
        except HydraException:
            composed = compose("config", overrides)
    raw: dict[str, Any] = OmegaConf.to_container(composed)  # type: ignore[assignment]
    del raw["paths"]
    # What refers to keys that the record sets itself follows the record.
    merged = OmegaConf.merge(OmegaConf.create(raw), OmegaConf.create(dict(config)))
    return {key: _resolved(merged, key, value) for key, value in raw.items()}


def _resolved(merged: Any, place: str, value: Any) -> Any:
    """The value without references; ??? and what refers to it stay out."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(value, dict):
        found = {key: _resolved(merged, f"{place}.{key}", child) for key, child in value.items()}
        return {key: child for key, child in found.items() if child is not _LACKING}
    if not isinstance(value, str) or not ("${" in value or value == "???"):
        return value
    try:
        given = OmegaConf.select(merged, place, throw_on_missing=True)
    except OmegaConfBaseException:
        return _LACKING
    return OmegaConf.to_container(given) if OmegaConf.is_config(given) else given


_LACKING = object()


def _nearest(folder: Path, node: Mapping[str, Any]) -> str | None:
    """The file of a group with the class of `node` that agrees with it in the most keys."""
    from omegaconf import OmegaConf

    best: tuple[int, str] | None = None
    for file in sorted(folder.glob("*.yaml")):
        written: Any = OmegaConf.to_container(OmegaConf.load(file))
        written = {key: value for key, value in written.items() if key != "defaults"}
        if written.get("_target_") != node.get("_target_"):
            continue
        alike = sum(node.get(key) == value for key, value in written.items())
        if best is None or alike > best[0]:
            best = alike, file.stem
    return best[1] if best else None


def _fill(node: dict[str, Any], template: Mapping[str, Any], place: str, notes: list[str]) -> None:
    """Put the keys of the template that `node` lacks where both are of one class."""
    if place and node.get("_target_") != template.get("_target_"):
        return
    for key, value in template.items():
        name = f"{place}.{key}" if place else str(key)
        if key not in node:
            if place in ("defense.recipe", "defense.wrap", "defense.regularize"):
                continue  # a part that the record has not, or not there
            node[key] = value
            if name in _AROUND:
                continue
            notes.append(f"{name} is newer than the record: it is filled with its default, {value}")
        elif isinstance(node[key], dict) and isinstance(value, Mapping) and "kwargs" not in name:
            _fill(node[key], value, name, notes)


def _drop_unknown(node: Any, place: str, notes: list[str]) -> None:
    """Leave out keys that the class of a node does not take any more."""
    if not isinstance(node, dict):
        return
    name = node.get("_target_")
    if isinstance(name, str) and name.startswith("robustbench_local."):
        try:
            accepted = inspect.signature(find_object(name)).parameters
        except Exception:  # building it tells what is wrong
            accepted = {}  # type: ignore[assignment]
        anything = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
        own = {*accepted, "_target_", "_recursive_", "_convert_", "_partial_", "_args_"}
        own |= {"checkpoint", "mean", "std"} if place == "model" else set()
        for key in sorted(set(node) - own) if accepted and not anything else []:
            del node[key]
            notes.append(
                f"{place}.{key} is a key that {name} does not know any more: it is left out"
            )
    for key, child in node.items():
        _drop_unknown(child, f"{place}.{key}" if place else key, notes)


@contextmanager
def _threads(recorded: int | None) -> Iterator[None]:
    """As many threads as the record had, where there are so many: sums are rounded as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(recorded or before, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    config: Mapping[str, Any],
    labels: Mapping[str, Any],
    data: Path,
    cache: Path,
    radii: Sequence[float],
) -> tuple[Record, PerExample]:
    """Make the record again in a folder that is removed, with what a run prints left out.

    It is attacked together with the others of `radii`.
    """
    from omegaconf import OmegaConf

    from robustbench_local.run import Choices, run

    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        paths = {"data": str(data), "cache": str(cache), "results": folder}
        own = config["threat"]["epsilon"]
        threat = {**config["threat"], "epsilon": list(radii) if len(radii) > 1 else own}
        whole = OmegaConf.create({**config, "threat": threat, "force": False, "paths": paths})
        choices = Choices({"attack": labels["attack"]}, (), labels)
        try:
            with redirect_stdout(io.StringIO()):
                made = run(whole, choices)
        except UserError as error:
            raise UserError(_as_option(str(error))) from None
        except EXPECTED as error:
            raise UserError(sentence(error, CONF)) from None
        store = Store(Path(folder))
        (run_id,) = (
            each["run_id"] for each in made if each["config"]["threat"]["epsilon"] == own
        )  # fmt: skip
        record = store.find(run_id)  # as JSON holds it
        assert record is not None
        return record, store.examples(run_id)


def _as_option(told: str) -> str:
    """What a run would have typed as a setting is typed as an option here."""
    told = told.replace("paths.data=", "--data ").replace("paths.cache=", "--cache ")
    return told.replace("type dataset.path=", "type --set dataset.path=")

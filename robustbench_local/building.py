"""From a configuration to what it names: devices, threat models, attacks, defenses."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustbench_local import processes
from robustbench_local.attacks import Attack
from robustbench_local.attacks.samples import with_samples
from robustbench_local.defenses import Defense
from robustbench_local.display import Display
from robustbench_local.errors import UserError
from robustbench_local.own_classes import check_call, check_parts, check_target, is_ours
from robustbench_local.threat import ThreatModel, parse_epsilon


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
    attack: object = build(node.attack)
    if not isinstance(attack, Attack):
        raise UserError(
            f"attack._target_={settings['attack'].get('_target_')} makes no attack but "
            f"{type(attack).__name__}; derive the class from robustbench_local.attacks.Attack"
        )
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
    threads = settings["threads"]
    if threads is not None and (
        not isinstance(threads, int) or isinstance(threads, bool) or threads < 1
    ):
        raise UserError(
            f"threads={threads} is not a whole number from 1, nor null for torch's own choice; "
            "type for example threads=2"
        )
    if settings["awareness"] not in ("adaptive", "oblivious"):
        raise UserError(
            f"awareness={settings['awareness']} is unknown; expected adaptive (the attack faces "
            "the defense) or oblivious (it ignores what is in front of the network): type for "
            "example awareness=oblivious"
        )


def check_chosen(overrides: Sequence[str]) -> None:
    """Raise `UserError` where a defense is named twice: the second would be merged into the first.

    `overrides` are those of the command line, which alone tell what was chosen.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        chosen = override.value()
        if override.key_or_group != "defense" or not isinstance(chosen, list):
            continue
        names = list(map(str, chosen))
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"defense=[{','.join(names)}] names {name} twice; expected each once, since "
                    f"parts are kept by name: type defense=[{','.join(dict.fromkeys(names))}]"
                )


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one; of several processes each has its own.

    Raises `UserError` for one that is not there.
    """
    found = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if found else "cpu"
    if name == "cuda" and found:
        own = processes.own_gpu(found)
        return torch.device("cuda") if own is None else torch.device("cuda", own)
    if name.startswith("cuda:") and processes.count() > 1:
        raise UserError(
            f"device={name} is one GPU for {processes.count()} processes; expected a GPU for each: "
            "type device=cuda"
        )
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
    """Instantiate a group of the configuration; its errors are told as the user's own.

    What a class from elsewhere raises in its constructor, but for a `ValueError`, stays what it is.
    """
    try:
        built = instantiate(node, _convert_="object")
    except InstantiationException as error:
        failure = error
    else:
        check_parts(built)
        return built
    group = str(node._get_full_key(None))
    found = re.search(r"full_key: (\S+)$", str(failure))
    place = found[1] if found else group
    inside = place.removeprefix(group).strip(".")
    failing = OmegaConf.select(node, inside) if inside else node
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    if cause is not None:
        raise UserError(_as_typed(str(cause), place, failing)) from None
    if not isinstance(failing, DictConfig):
        raise failure
    try:
        name = str(failing._target_)
    except OmegaConfBaseException:  # what it refers to is not there
        raise failure from None
    if not str(failure).startswith("Error in call"):
        check_target(name, place)
        raise failure
    target = get_object(name)
    if "_args_" not in failing:
        check_call(target, name, place, [key for key in map(str, failing) if key not in _HYDRAS])
    theirs = failure.__cause__
    if theirs is None or isinstance(theirs, ValueError) or is_ours(target):
        raise failure
    raise theirs


_HYDRAS = frozenset({"_target_", "_recursive_", "_convert_", "_partial_"})
"""Keys that no class is given."""


def _as_typed(message: str, place: str, failing: DictConfig) -> str:
    """A message about a part of a defense with its keys as they are typed for the part at `place`.

    A part calls itself after its file, `defense.wrap.median`; the attacks, threat models and
    schedules in it call themselves `attack`, `threat` and `train`. It may lie anywhere, and a
    setting may follow another one.
    """

    def typed(found: re.Match[str]) -> str:
        words = found[0].split(".")
        first = 3 if words[0] == "defense" else 1
        if first == 1 and len(words) > 2:
            return found[0]
        for start in range(first, len(words)):
            if words[start] in failing:
                raw = OmegaConf.to_container(failing, resolve=False)
                assert isinstance(raw, dict)
                followed = re.fullmatch(r"\$\{([\w.]+)\}", str(raw[words[start]]))
                key = followed[1] if followed else f"{place}.{words[start]}"
                return ".".join([key, *words[start + 1 :]])
        return found[0]

    if not place.startswith("defense."):
        return message
    return re.sub(r"\b(?:defense|attack|threat|train)(?:\.\w+)+", typed, message)


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

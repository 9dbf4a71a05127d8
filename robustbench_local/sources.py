"""The models a transfer attack starts from: trained, out of the cache, or from a file."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustbench_local.attacks.transfer import Source, split_source
from robustbench_local.data import Dataset
from robustbench_local.errors import UserError
from robustbench_local.identity import file_sha256, find_object
from robustbench_local.models import build_model, check_model, load_checkpoint
from robustbench_local.training import Trained
from robustbench_local.training.loop import seeded
from robustbench_local.training.store import Shelf


def get_sources(
    names: Sequence[str],
    settings: Mapping[str, Any],
    data: Dataset,
    victim: Trained,
    *,
    train: Callable[[int], Trained],
    device: torch.device,
) -> list[Source]:
    """The models that the entries of `attack.sources` stand for, frozen, on the device.

    `train` gives the victim's kind of model, undefended, for a training seed. Raises `UserError`
    for an entry it cannot find, weights that do not fit, and those of the victim itself.
    """
    sources = []
    for name in names:
        form, value = split_source(name) or ("", "")
        if form == "seed":
            trained = train(int(value))
            source = Source(name, trained.model, trained.key, trained.sha256)
        elif form == "cache":
            source = _from_cache(name, value, settings, data, device)
        else:
            source = _from_file(name, value, settings, data, device)
        if _content(source.model) == _content(victim.model):
            raise UserError(
                f"attack.sources entry {name} has the weights of the victim itself, so nothing "
                "would be transferred; expected another model, or type attack=pgd to attack the "
                "victim with all access"
            )
        sources.append(source)
    return sources


def identify(name: str, cache: Path) -> str:
    """What an entry stands for, whatever its file is called: it decides the numbers of a run."""
    form, value = split_source(name) or ("", "")
    file = Path(value).expanduser()
    if form == "file" and file.is_file():
        return f"file:{file_sha256(file)}"
    found = _matches(value, cache) if form == "cache" else []
    return f"cache:{found[0].stem}" if len(found) == 1 else name


def _matches(prefix: str, cache: Path) -> list[Path]:
    files = sorted((cache / "weights").glob("*.json"))
    return [file for file in files if file.stem.startswith(prefix)]


def _cache(settings: Mapping[str, Any]) -> Path:
    return Path(str(settings["paths"]["cache"])).expanduser()


def _from_cache(
    name: str, prefix: str, settings: Mapping[str, Any], data: Dataset, device: torch.device
) -> Source:
    cache = _cache(settings)
    found = _matches(prefix, cache)
    if len(found) != 1:
        state = f"fits {len(found)} sets of weights" if found else "fits no weights"
        there = found or _matches("", cache)
        told = "; ".join(_describe(file) for file in there[:10]) or "none"
        more = f"; and {len(there) - 10} more" if len(there) > 10 else ""
        raise UserError(
            f"attack.sources entry {name} {state} in {cache / 'weights'}; expected the beginning "
            f"of one key of: {told}{more}"
        )
    shelf = Shelf(cache, found[0].stem)
    about = shelf.find()
    if about is None:
        raise UserError(
            f"attack.sources entry {name}: the weights {shelf.key} are damaged; expected a whole "
            "file: train them again, or name others"
        )
    parts = about["parts"]
    shape, classes = tuple(parts["input_shape"]), parts["classes"]
    if (shape, classes) != (data.input_shape, data.num_classes):
        raise UserError(
            f"attack.sources entry {name} takes images of shape {shape} and knows {classes} "
            f"classes; expected shape {data.input_shape} and {data.num_classes} classes as in "
            f"{data.name}: name weights trained for such data"
        )
    config = {key: value for key, value in parts["model"].items() if key != "code"}
    if config["_target_"] != settings["model"]["_target_"]:  # which the user has typed
        _require_network(name, config)
    model = _build(config, data, device)
    try:
        model.load_state_dict(shelf.read())
    except RuntimeError as error:  # the code of the architecture may have changed since
        raise UserError(
            f"attack.sources entry {name} does not fit {config['_target_']} as it is now "
            f"({' '.join(str(error).split())[:200]}); expected weights of this architecture: train "
            "them again"
        ) from None
    return Source(name, _checked(model, data, device), shelf.key, about["sha256"])


def _require_network(name: str, config: Mapping[str, Any]) -> None:
    """Raise `UserError` unless only a network would be built: the file may be anyone's."""
    try:
        network = find_object(str(config["_target_"]))
    except (ImportError, AttributeError, ValueError):
        network = None
    inner = [value for value in config.values() if isinstance(value, Mapping | list)]
    nested = any("_target_" in json.dumps(value) for value in inner)
    if not (isinstance(network, type) and issubclass(network, nn.Module)) or nested:
        raise UserError(
            f"attack.sources entry {name} names {config['_target_']}, which is no class of "
            "networks with plain settings; expected a torch.nn.Module, or the victim's own "
            "model._target_: name other weights, or give these as file:PATH beside their "
            "model._target_"
        )


def _from_file(
    name: str, path: str, settings: Mapping[str, Any], data: Dataset, device: torch.device
) -> Source:
    file = Path(path).expanduser()
    model = _build(settings["model"], data, device)
    try:
        load_checkpoint(model, file)
        sha256 = file_sha256(file)
        return Source(name, _checked(model, data, device), f"checkpoint-{sha256[:16]}", sha256)
    except UserError as error:
        raise UserError(f"attack.sources entry {name}: {error}") from None


def _build(config: Mapping[str, Any], data: Dataset, device: torch.device) -> Any:
    with seeded(0, device):  # the initial weights are drawn, and then replaced
        return build_model(config, data).to(device)


def _checked(model: nn.Module, data: Dataset, device: torch.device) -> nn.Module:
    check_model(model, data, device)
    return model.eval().requires_grad_(False)


def _content(model: nn.Module) -> list[str]:
    """The parameters whatever they are called: a copy may have come in another format."""
    return sorted(
        hashlib.sha256(weight.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for weight in model.parameters()
    )


def _describe(file: Path) -> str:
    """One candidate in a few words."""
    try:
        parts = json.loads(file.read_text("utf-8"))["parts"]
        model = str(parts["model"]["_target_"]).rpartition(".")[2]
        recipe = str(parts["recipe"][""]).rpartition(".")[2]
        return f"{file.stem} ({model}, {recipe}, seed {parts['seed']})"
    except (OSError, ValueError, KeyError, TypeError):
        return file.stem

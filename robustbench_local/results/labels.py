"""Short names for the choices of a run: `pgd`, or `pgd-steps100` where a key was changed."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

_UNNAMED = frozenset({"checkpoint"})  # named by its content, see `run.name_row`

_ANY_OF_A_LIBRARY = frozenset({"art", "art_detector", "torchattacks"})
"""Choices of which the key `name` says what they are: that is named even where nothing changed."""


def choice_label(config: DictConfig, group: str, choice: str, folders: Iterable[Path]) -> str:
    """The name of a choice, followed by every key that differs from its own file.

    `config` is the whole composed configuration; `folders` are the configuration folders, searched
    in turn for `<group>/<choice>.yaml`. A key that the file takes from elsewhere (`${...}`) differs
    only where it was overridden itself. Of several defenses each names its own keys. What
    stands for a whole library is named with what was taken from it: `art-SpatialSmoothing`.
    """
    files = (folder / group / f"{choice}.yaml" for folder in folders)
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return choice
    untouched = config.copy()
    with open_dict(untouched):
        untouched[group] = OmegaConf.load(file)
        untouched[group].pop("defaults", None)  # what composing it did elsewhere
    written, given = (
        dict(_leaves(OmegaConf.to_container(root[group], resolve=True)))
        for root in (untouched, config)
    )
    taken, changes = [], []
    for path in sorted(written.keys() | given.keys()):
        value = given.get(path, "-")
        parts = path.split(".")
        if group == "defense":
            if parts[1:2] != [choice]:
                continue
            parts = parts[2:]
        if parts == ["name"] and choice in _ANY_OF_A_LIBRARY:
            taken.append(str(value))
            continue
        if parts[-1] in _UNNAMED or str(written.get(path)) == str(value):
            continue
        short = (
            str(value).split(".")[-1] if parts[-1] == "_target_" else ".".join(parts) + str(value)
        )
        changes.append(short.replace(" ", ""))
    return "-".join([choice, *taken, *changes])


def _leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, node

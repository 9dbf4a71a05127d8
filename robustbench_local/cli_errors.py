"""One sentence for everything a user can get wrong on the command line."""

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustbench_local.errors import FoulError, UserError

ADDED = frozenset({"experiment"})
"""Groups that the main configuration chooses nothing from, so that a choice begins with +."""

EXPECTED = (UserError, FoulError, HydraException, OmegaConfBaseException)
"""What is told in a sentence; anything else is a defect of ours and keeps its traceback."""


def sentence(error: BaseException, conf: Path) -> str:
    """What came, what was expected, what to type."""
    for cause in _causes(error):
        if isinstance(cause, UserError | FoulError):
            return str(cause)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return _unknown_choice(group, choice, error.options)
    text = " ".join(str(error).split())
    missing = re.match(r"In '[^']*': Could not load '([^']+)/([^'/]+)'", text)
    if missing and (conf / missing[1]).is_dir():  # one of a list
        options = [file.stem for file in (conf / missing[1]).glob("*.yaml")]
        return _unknown_choice(missing[1], missing[2], options)
    key = re.match(r"Could not override '([^']+)'", text)
    if key:
        return _unknown_key(key[1], conf, sys.argv[1:])
    causes = [" ".join(str(cause).split()) for cause in _causes(error)]
    root = causes[-1] if causes[-1] not in text else ""
    return f"{text} {root}".strip() + "; type --help for the groups, --cfg job for every key"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_choice(group: str, choice: str, options: Sequence[str]) -> str:
    options = sorted(options)
    near = difflib.get_close_matches(choice, options, 1) or options[:1]
    plus = "+" if group in ADDED else ""
    return (
        f"{group}={choice} does not exist; expected one of {', '.join(options)}: type "
        f"{plus}{group}={near[0] if near else 'CHOICE'}"
    )


def _unknown_key(key: str, conf: Path, words: Sequence[str]) -> str:
    if key in ADDED:
        typed = next((word for word in words if word.startswith(f"{key}=")), f"{key}=CHOICE")
        return f"{key} is a group that nothing is chosen from so far: type +{typed}"
    config = _compose(conf, words)
    known = [*map(str, config), *_keys(config)]
    leaf = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(key, same, 1, 0) or difflib.get_close_matches(key, known, 1)
    typed = f"type {near[0]}=VALUE" if near else "type --cfg job to see them all"
    # Where keys can be added at all: a network of the user's own, another library's parameters.
    mapping = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else None
    new = f", or +{key}=VALUE to add a new one" if isinstance(mapping, DictConfig) else ""
    expected = "is not a key of the configuration; expected one that --cfg job prints"
    return f"{key} {expected}: {typed}{new}"


def _compose(conf: Path, words: Sequence[str]) -> DictConfig:
    """The configuration with what `words` choose from groups, or without where that fails."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    chosen = [word for word in words if (conf / word.lstrip("+").partition("=")[0]).is_dir()]
    with initialize_config_dir(str(conf), version_base="1.3"):
        try:
            return compose("config", chosen)
        except HydraException:
            return compose("config")


def _keys(node: DictConfig, path: str = "") -> Iterator[str]:
    """The keys that hold a value, with dots."""
    for name in map(str, node):
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            yield from _keys(child, f"{path}{name}.")
        else:
            yield f"{path}{name}"

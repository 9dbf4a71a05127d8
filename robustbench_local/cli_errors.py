"""One sentence for everything a user can get wrong on the command line."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from robustbench_local.errors import FoulError, UserError

EXPECTED = (UserError, FoulError, HydraException, OmegaConfBaseException)
"""What is told in a sentence; anything else is a defect of ours and keeps its traceback."""


def sentence(error: BaseException, conf: Path) -> str:
    """What came, what was expected, what to type."""
    for cause in _causes(error):
        if isinstance(cause, UserError | FoulError):
            return str(cause)
    if isinstance(error, MissingConfigException) and error.options is not None:
        wanted = str(error.missing_cfg_file)
        group, _, choice = wanted.rpartition("/")
        near = difflib.get_close_matches(choice, error.options, 1) or error.options[:1]
        return (
            f"{group}={choice} does not exist; expected one of {', '.join(error.options)}: type "
            f"{group}={near[0] if near else 'CHOICE'}"
        )
    text = " ".join(str(error).split())
    key = re.match(r"Could not override '([^']+)'", text)
    if key:
        return _unknown_key(key[1], conf)
    causes = [" ".join(str(cause).split()) for cause in _causes(error)]
    root = causes[-1] if causes[-1] not in text else ""
    return f"{text} {root}".strip() + "; type --help for the groups, --cfg job for every key"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_key(key: str, conf: Path) -> str:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config")

    def keys(node: DictConfig, path: str = "") -> Iterator[str]:
        for name in map(str, node):
            yield f"{path}{name}"
            child = node._get_node(name)
            if isinstance(child, DictConfig):
                yield from keys(child, f"{path}{name}.")

    known = list(keys(config))
    near = difflib.get_close_matches(key, known, 1, 0.5) or ["KEY"]
    return (
        f"{key} is not a key of the configuration; expected one that --cfg job prints: type "
        f"{near[0]}=VALUE, or +{key}=VALUE to add a new one"
    )

"""One sentence for everything a user can get wrong on the command line."""

import difflib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustbench_local.errors import FoulError, UserError

PACKAGE = Path(__file__).resolve().parent
CONF = next(
    (folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir()),
    PACKAGE / "conf",
)
"""The configuration files: in an installed package, or beside it in a checkout."""

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
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    text = " ".join(str(error).split())
    missing = re.match(r"In '[^']*': Could not load '([^']+)/([^'/]+)'", text)
    folders = [conf, *own_folders(sys.argv[1:])]
    if missing and any((folder / missing[1]).is_dir() for folder in folders):  # one of a list
        found = {file.stem for folder in folders for file in (folder / missing[1]).glob("*.yaml")}
        return _unknown_choice(missing[1], missing[2], list(found))
    several = re.match(r"Ambiguous value for argument '([^=]+)=(.+?)' 1\.", text)
    if several:
        name, values = several.groups()
        other = ""
        if name in ("defense", "threat.epsilon"):
            other = f", or {name}=[{values}] for a list"
        elif not (conf / name).is_dir() and "'" not in values:  # of a group one file is chosen
            other = f", or \"{name}='{values}'\" for one value with commas"
        return (
            f"{name}={values} has several values; expected one: type -m {name}={values} for a run "
            f"with each{other}"
        )
    key = re.match(r"Could not override '([^']+)'", text)
    if key:
        return _unknown_key(key[1], conf, sys.argv[1:])
    causes = [" ".join(str(cause).split()) for cause in _causes(error)]
    root = causes[-1] if causes[-1] not in text else ""
    return f"{text} {root}".strip() + "; type --help for the groups, --cfg job for every key"


def told_file(error: OSError) -> str:
    """About a file or folder that the system refuses."""
    return f"{error.filename or 'a file'} cannot be used ({error.strerror or error})"


def check_dashes(words: Sequence[str]) -> None:
    """Raise `UserError` for a setting that was typed as an option, `--KEY=VALUE`.

    Hydra would take some for beginnings of its own options.
    """
    for word in words:
        name, is_set, value = word.partition("=")
        if name.startswith("--") and is_set and name not in _TAKE_A_VALUE:
            key = name.lstrip("-")
            plus = "+" if key in ADDED else ""
            raise UserError(
                f"{word} is no option; settings have no dashes: type {plus}{key}={value}"
            )


_TAKE_A_VALUE = ("--cfg", "--config-dir", "--config-name", "--config-path",
                 "--experimental-rerun", "--info", "--package")  # fmt: skip


def own_folders(words: Sequence[str]) -> list[Path]:
    """The folders of the user's that the command line names with `--config-dir`."""
    named = [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]
    named += [word for name, word in pairwise(words) if name in ("--config-dir", "-cd")]
    return [Path(name).absolute() for name in named if name]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_choice(group: str, choice: str, options: Sequence[str]) -> str:
    options = sorted(options)
    near = difflib.get_close_matches(choice.lower(), options, 1)
    plus = "+" if group in ADDED else ""
    return (
        f"{group}={choice} does not exist; expected one of {', '.join(options)}: type "
        f"{plus}{group}={near[0] if near else 'NAME'}"
    )


def _unreadable(word: str) -> str:
    key, is_set, value = word.partition("=")
    if not is_set and re.fullmatch(r"\+*[\w./@]+", word):
        return f"{word} sets nothing; expected KEY=VALUE: type {word}=VALUE"
    closed = _closed(word)
    if closed != word:
        return (
            f"{word} has a bracket that is not closed or not opened; expected KEY=VALUE, a list as "
            f"KEY=[A,B]: type {shlex.quote(closed)}"
        )
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    typed = shlex.quote(f"{key}='{escaped}'" if is_set else "KEY='VALUE'")
    return (
        f"{word} cannot be read; expected KEY=VALUE, with quotes around what holds spaces, commas, "
        f"quotes or brackets: type {typed}"
    )


def _closed(word: str) -> str:
    """The word up to a bracket that closes none, with those that are open closed."""
    closes, open_ = {"[": "]", "{": "}", "(": ")"}, ""
    for place, letter in enumerate(word):
        if letter in closes:
            open_ = closes[letter] + open_
        elif letter in closes.values():
            if not open_.startswith(letter):
                return word[:place] + open_
            open_ = open_[1:]
    return word + open_


def _unknown_key(key: str, conf: Path, words: Sequence[str]) -> str:
    if key in ADDED:
        typed = next((word for word in words if word.startswith(f"{key}=")), f"{key}=CHOICE")
        return f"{key} is a group that nothing is chosen from so far: type +{typed}"
    config = _compose(conf, words)
    near = _nearest(key, [*map(str, config), *_keys(config)])
    typed = f"type {near}=VALUE" if near else "type --cfg job to see them all"
    # Where keys can be added at all: a network, and what else may be of a class of the user's own.
    place = key.rpartition(".")[0]
    mapping = OmegaConf.select(config, place) if place else None
    target = str(mapping.get("_target_", "")) if isinstance(mapping, DictConfig) else ""
    addable = place == "model" or target.partition(".")[0] not in ("", __package__)
    new = f", or +{key}=VALUE to add a new one" if addable else ""
    expected = "is not a key of the configuration; expected one that --cfg job prints"
    return f"{key} {expected}: {typed}{new}"


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The key that is meant, or None where nothing resembles it.

    A name that is right in the wrong place counts before one that is misspelt, and that before one
    that is cut short; of several the one in the most similar place.
    """

    def leaf(name: str) -> str:
        return name.rpartition(".")[2]

    def alike(name: str) -> float:
        return difflib.SequenceMatcher(None, leaf(key), leaf(name)).ratio()

    def begins(name: str) -> bool:
        short, long = sorted((leaf(key), leaf(name)), key=len)
        return len(short) >= 3 and long.startswith(short)

    within = key.rpartition(".")[0]
    for fits in (
        lambda name: leaf(name) == leaf(key),
        lambda name: alike(name) >= 0.8 and name.rpartition(".")[0] == within,
        begins,
        lambda name: alike(name) >= 0.8,
    ):
        if near := difflib.get_close_matches(key, filter(fits, known), 1, 0):
            return near[0]
    return None


def _compose(conf: Path, words: Sequence[str]) -> DictConfig:
    """The configuration with what `words` choose from groups, or without where that fails."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    own = own_folders(words)
    chosen = [
        word
        for word in words
        if any((folder / word.lstrip("+").partition("=")[0]).is_dir() for folder in (conf, *own))
    ]
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in own)}]"] if own else []
    with initialize_config_dir(str(conf), version_base="1.3"):
        try:
            return compose("config", [*chosen, *search])
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


_TAKE_A_WORD = ("--cfg", "--config-dir", "--config-name", "--config-path", "--experimental-rerun",
                "--package", "-c", "-cd", "-cn", "-cp", "-p")  # fmt: skip
"""Hydra's options that the word behind them belongs to; `--info` and `-i` may have one."""


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options, with the words that belong to them, and the overrides of a command line."""
    options: list[str] = []
    overrides: list[str] = []
    before = ""
    for word in words:
        optional = before in ("--info", "-i") and "=" not in word and not word.startswith("-")
        value = before in _TAKE_A_WORD or optional
        (options if value or word.startswith("-") else overrides).append(word)
        before = "" if value else word
    return options, overrides

"""The command line of the selftest: compose an attack and a threat model, try, tabulate."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from robustbench_local.__main__ import CONF, lifted
from robustbench_local.cli_errors import EXPECTED, sentence
from robustbench_local.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robustbench_local.selftest.run import Outcome

HELP = """\
Run an attack against victims whose answer is known, and print which it fails on.

  python -m robustbench_local.selftest attack=pgd
  python -m robustbench_local.selftest attack=standard threat.norm=l2 threat.epsilon=2
  python -m robustbench_local.selftest attack._target_=mypackage.Attack +attack.steps=20
  python -m robustbench_local.selftest attack=mine --config-dir DIR

Groups and keys are those of python -m robustbench_local; attack and threat count. The exit code
is 1 where something fails."""


def main(words: Sequence[str]) -> int:
    """Try what the command line says; 1 after an error or a failure, else 0."""
    if {"-h", "--help"} & set(words):
        sys.stdout.write(f"{HELP}\n")
        return 0
    sys.path.insert(0, os.getcwd())  # a user's own classes, by attack._target_
    try:
        return _try(composed(words))
    except EXPECTED as error:
        sys.stderr.write(f"error: {sentence(error, CONF)}\n")
        return 1


def composed(words: Sequence[str]) -> "DictConfig":
    """The configuration for these overrides; `--config-dir DIR` adds a folder of the user's."""
    from hydra import compose, initialize_config_dir

    words, folders = list(words), []
    for place, word in enumerate(words):
        if word.startswith("--config-dir="):
            words[place : place + 1] = word.split("=", 1)
    while "--config-dir" in words:
        place = words.index("--config-dir")
        folders.append(f"file://{_folder(words[place + 1 : place + 2])}")
        del words[place : place + 2]
    if folders:
        words.append(f"hydra.searchpath=[{','.join(folders)}]")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", own_attack(lifted(words)))


def _folder(words: Sequence[str]) -> str:
    """The folder that follows on `--config-dir`, absolute."""
    for word in words:
        if os.path.isdir(word):
            return os.path.abspath(word)
        raise UserError(
            f"--config-dir {word} is not there; expected a folder with your own attack/NAME.yaml: "
            "type --config-dir DIR"
        )
    raise UserError(
        "--config-dir came without a folder; expected one with your own attack/NAME.yaml: type "
        "--config-dir DIR"
    )


def own_attack(words: Sequence[str]) -> list[str]:
    """The overrides, where `attack._target_` without `attack=` is a class with keys of its own.

    The file that is the default would bring keys that another class does not have.
    """
    keys = [word.lstrip("+").split("=")[0] for word in words]
    if "attack._target_" not in keys or "attack" in keys:
        return list(words)
    added = [
        f"++{word.lstrip('+')}" if key.startswith("attack.") else word
        for word, key in zip(words, keys, strict=True)
    ]
    seed = [] if "attack.seed" in keys else ["++attack.seed=${seed}"]
    return ["~attack", *added, *seed]


def _try(config: "DictConfig") -> int:
    # Imported here: --help must not wait for torch.
    from omegaconf import OmegaConf

    from robustbench_local.building import build, build_attack
    from robustbench_local.display import output
    from robustbench_local.selftest.run import selftest

    settings: dict[str, object] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]

    outcomes = list(selftest(partial(build_attack, settings), build(config.threat)))
    _show(outcomes, config, output())
    failed = any(outcome.verdict == "FAIL" for outcome in outcomes)
    passed = any(outcome.verdict == "pass" for outcome in outcomes)
    return 0 if passed and not failed else 1


def _show(outcomes: Sequence["Outcome"], config: "DictConfig", console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    from robustbench_local.results.report import print_title

    threat, name = config.threat, str(config.attack._target_).rpartition(".")[2]
    title = f"{name} under {threat.norm} {threat.epsilon}, access to {threat.access}"
    table = Table()
    for column in ("victim", "known", "reached", "verdict", ""):
        table.add_column(column, no_wrap=column == "verdict", overflow="fold")
    colours = {"pass": "green", "FAIL": "bold red", "skipped": "yellow"}
    for outcome in outcomes:
        verdict = f"[{colours[outcome.verdict]}]{outcome.verdict}[/]"
        cells = map(escape, (outcome.victim, outcome.known, outcome.reached))
        table.add_row(*cells, verdict, escape(outcome.why))
    print_title(title, console)
    console.print(table)
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in colours}
    told = f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped"
    console.print(told, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

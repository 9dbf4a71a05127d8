"""The command line: finds conf/, lets Hydra compose it, hands over to `run`."""

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from robustbench_local import processes
from robustbench_local.cli_errors import EXPECTED, check_dashes, sentence

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from robustbench_local.results import Record

PACKAGE = Path(__file__).resolve().parent
CONF = next(
    (folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir()),
    PACKAGE / "conf",
)


TAKES_A_WORD = ("--cfg", "--config-dir", "--config-name", "--config-path", "--experimental-rerun",
                "--package", "-c", "-cd", "-cn", "-cp", "-p")  # fmt: skip
"""Hydra's options that the word behind them belongs to; `--info` and `-i` may have one."""


def options_first(words: list[str]) -> list[str]:
    """The command line with Hydra's options in front, since it reads none between overrides."""
    options: list[str] = []
    overrides: list[str] = []
    before = ""
    for word in words:
        optional = before in ("--info", "-i") and "=" not in word and not word.startswith("-")
        value = before in TAKES_A_WORD or optional
        (options if value or word.startswith("-") else overrides).append(word)
        before = "" if value else word
    return [*options, *overrides]


def lifted(words: list[str]) -> list[str]:
    """The command line, with `attack.kwargs.KEY=VALUE` marked as keys that no file needs to list.

    They are the hyper-parameters of other libraries, which only these know; a defense has them too.
    """
    theirs = ("attack.kwargs.", "defense.wrap.art.kwargs.")
    return [f"++{word}" if word.startswith(theirs) else word for word in words]


def main() -> None:
    """Run what the command line says; exit with 1 after an error and 130 after Ctrl-C."""
    sys.path.insert(0, os.getcwd())  # a user's own classes, by model._target_
    # Waiting threads sleep: where another program shares the cores, spinning ones made the small
    # batches of a training 8 times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.argv[1:] = options_first(lifted(sys.argv[1:]))
    failures: list[str] = []
    if not processes.leads():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # to the end
    if processes.count() > 1:
        # DistributedDataParallel would advise every process against finding unused weights, which
        # it cannot know. Read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def task(config: "DictConfig") -> "list[Record] | None":
        # Imported here: --help must not wait for torch.
        from robustbench_local.run import run_from_hydra

        try:
            return run_from_hydra(config)
        except EXPECTED as error:  # the other runs of a sweep go on
            if processes.count() > 1:  # but not here: the processes would lose each other
                processes.tell(f"error: {sentence(error, CONF)}")
                sys.exit(1)
            failures.append(sentence(error, CONF))
            print(f"error: {failures[-1]}", file=sys.stderr)
            return None
        except OSError:
            raise
        except Exception as error:  # of somebody's own class, or a defect of ours
            if processes.count() > 1 or HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
            traceback.print_exc()
            failures.append(str(error))
            return None

    # Hydra would print its own account of an error, in several lines; this makes it raise.
    told = os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        check_dashes(sys.argv[1:])
        task()
    except EXPECTED as error:
        if told != "1":
            raise
        processes.tell(f"error: {sentence(error, CONF)}")
        sys.exit(1)
    except OSError as error:
        why = f"{error.filename or 'a file'} cannot be used ({error.strerror or error})"
        processes.tell(f"error: {why}")
        sys.exit(1)
    except KeyboardInterrupt:
        if processes.leads():
            print(
                "interrupted: nothing is torn; the same command goes on from the last finished "
                "epoch",
                file=sys.stderr,
            )
        sys.exit(130)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()

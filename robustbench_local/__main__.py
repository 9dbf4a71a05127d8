"""The command line: finds conf/, lets Hydra compose it, hands over to `run`."""

import os
import sys

import hydra

from robustbench_local import processes
from robustbench_local.cli_errors import (
    CONF,
    EXPECTED,
    check_dashes,
    sentence,
    split_options,
    told_file,
)
from robustbench_local.presets import prefer_own_presets
from robustbench_local.sweeps.task import FAILURES, task

__all__ = ["CONF", "lifted", "main", "options_first"]


def options_first(words: list[str]) -> list[str]:
    """The command line with Hydra's options in front, since it reads none between overrides."""
    options, overrides = split_options(words)
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
    FAILURES.clear()
    if not processes.leads():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # to the end
    if processes.count() > 1:
        # DistributedDataParallel would advise every process against finding unused weights, which
        # it cannot know. Read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    command = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)
    # Hydra would print its own account of an error, in several lines; this makes it raise.
    told = os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        check_dashes(sys.argv[1:])
        prefer_own_presets()
        command()
    except EXPECTED as error:
        if told != "1":
            raise
        processes.tell(f"error: {sentence(error, CONF)}")
        sys.exit(1)
    except OSError as error:
        processes.tell(f"error: {told_file(error)}")
        sys.exit(1)
    except KeyboardInterrupt:
        if processes.leads():
            print(
                "interrupted: nothing is torn; the same command goes on from the last finished "
                "epoch",
                file=sys.stderr,
            )
        sys.exit(130)
    if FAILURES:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The end of a sweep: its table, the leaderboard, and what is left to do with how to do it."""

import shlex
import sys
from collections.abc import Sequence
from math import prod

from omegaconf import DictConfig
from rich.markup import escape

from robustbench_local.cli_errors import split_options
from robustbench_local.display import Display
from robustbench_local.results import write_leaderboard
from robustbench_local.results.comparison import compare
from robustbench_local.sweeps.journal import VARIABLE
from robustbench_local.sweeps.watch import Ended, Watch

_COMMAND = "python -m robustbench_local"


def finish(watch: Watch, results: str) -> None:
    """Compare the runs that have a record, in the order of the sweep, and fold the leaderboard."""
    if watch.silent:  # a run alone has shown all that itself
        return
    names = dict.fromkeys(name for job in watch.plan.jobs for name in job.run_ids)
    order = [*names, *(name for name in watch.records if name not in names)]
    records = [watch.records[name] for name in order if name in watch.records]
    if len(records) > 1:
        compare(records, results)
    for job in watch.plan.jobs:
        left = [name for name in job.run_ids if name not in watch.records]
        if job.shard and left and not (job in watch.ended and watch.ended[job].error):
            told = f"shard {job.shard} of run {' '.join(left)} is recorded, others are missing"
            watch.console.print(told, soft_wrap=True, highlight=False)
    for store in dict.fromkeys(job.store for job in watch.plan.jobs if job.run_ids):
        if store.records.is_dir():
            path = escape(str(write_leaderboard(store)))
            watch.console.print(f"table: {path}", soft_wrap=True, highlight=False)


def tell_failures(failures: Sequence[Ended], watch: Watch, config: DictConfig) -> None:
    """List the runs that failed, each with its sentence, and what to type."""
    display = Display()
    if watch.silent:
        _error(display, f"error: {failures[0].error}")
        return
    done = "; the others are recorded" if watch.records else ""
    _error(display, f"error: {len(failures)} of {len(watch.plan.jobs)} runs failed{done}")
    for ended in failures:
        _error(display, f"  {ended.job.name}: {ended.error}")
    options, words = split_options(sys.argv[1:])
    same = shlex.join([*options, *words])
    _error(display, f"the same command runs only what is missing: {_COMMAND} {same}")
    narrow = only_these([list(ended.job.overrides) for ended in failures])
    if narrow is not None:
        if not {"-m", "--multirun"} & set(options):
            options = ["-m", *options]
        own = [word for word in config.hydra.overrides.hydra if _is_typed(word)]
        _error(display, f"these alone: {_COMMAND} {shlex.join([*options, *own, *narrow])}")


def tell_interrupted(watch: Watch) -> None:
    """What Ctrl-C left, in one sentence."""
    _error(
        Display(),
        f"interrupted: {len(watch.records)} of {watch.plan.total} runs are recorded and nothing is "
        "torn; the same command goes on with the rest",
    )


def only_these(jobs: Sequence[Sequence[str]]) -> list[str] | None:
    """Overrides whose combinations are these jobs and no others; None where there are no such."""
    keys = [word.partition("=")[0] for word in jobs[0]]
    if any([word.partition("=")[0] for word in words] != keys for words in jobs):
        return None
    columns = zip(*jobs, strict=True)
    values = [dict.fromkeys(word.partition("=")[2] for word in column) for column in columns]
    if prod(map(len, values)) != len({tuple(words) for words in jobs}):
        return None
    return [f"{key}={','.join(found)}" for key, found in zip(keys, values, strict=True)]


def _is_typed(word: str) -> bool:
    """Whether the user gave this setting of Hydra's, and not the sweep itself."""
    return VARIABLE not in word and not word.startswith(("hydra.sweep.dir=", "hydra.mode="))


def _error(display: Display, sentence: str) -> None:
    display.errors.print(escape(sentence), soft_wrap=True, highlight=False)

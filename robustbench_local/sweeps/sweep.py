"""A sweep from its plan to its end: what the sweeper `planned` does."""

import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict, read_write

from robustbench_local.display import Display
from robustbench_local.errors import UserError
from robustbench_local.processes import agree, leads
from robustbench_local.results.store import check_writable
from robustbench_local.sweep import SAID
from robustbench_local.sweeps.devices import cores, visible_gpus
from robustbench_local.sweeps.ending import finish, tell_failures, tell_interrupted
from robustbench_local.sweeps.estimate import Estimate, estimate
from robustbench_local.sweeps.journal import VARIABLE, Info, Journal
from robustbench_local.sweeps.launch import launch_all
from robustbench_local.sweeps.plan import Plan, make_plan
from robustbench_local.sweeps.watch import Watch, duration

if TYPE_CHECKING:
    from hydra_plugins.robustbench_local.planned import PlannedSweeper

_NEEDS = {
    "hydra_joblib_launcher": ("joblib", "hydra-joblib-launcher"),
    "hydra_submitit_launcher": ("slurm", "hydra-submitit-launcher"),
    "hydra_ray_launcher": ("ray", "hydra-ray-launcher"),
}
"""The launchers that are plugins: the extra that brings them, and the package."""


def prepare(config: DictConfig) -> Journal:
    """Choose the folder of the journal, and have every job told of it, on whatever machine.

    Raises `UserError` where the launcher is not installed or a folder cannot be written.
    """
    launcher = config.hydra.launcher
    _check_installed(str(launcher._target_))
    cache = Path(str(config.paths.cache)).expanduser()
    check_writable(cache, "paths.cache")
    check_writable(Path(str(config.paths.results)).expanduser() / "records", "paths.results")
    journal = Journal.choose(cache)
    folder = str(journal.folder).replace("\\", "\\\\").replace("'", "\\'")
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(journal.folder)
        config.hydra.overrides.hydra += [
            f"hydra.sweep.dir='{folder}'",
            f"++hydra.job.env_set.{VARIABLE}='{folder}'",
        ]
        if "n_jobs" in launcher and launcher.n_jobs is None:
            launcher.n_jobs = workers(config)
    return journal


def sweep(sweeper: "PlannedSweeper", arguments: Sequence[str]) -> None:
    """Plan, launch, tell; exits with 1 where a run failed and with 130 after Ctrl-C."""
    config, context = sweeper.config, sweeper.hydra_context
    assert config is not None and context is not None
    SAID.clear()
    journal, loader = sweeper.journal, context.config_loader
    jobs = _combinations(sweeper, arguments)
    plan = make_plan(jobs, lambda words: loader.load_sweep_config(config, words))
    # Where several processes train together they have to launch the same jobs.
    numbers = agree(lambda: [plan.jobs.index(job) for job in plan.to_launch])
    plan.to_launch = [plan.jobs[number] for number in numbers]
    expected = estimate(plan.to_launch)
    info = _info(config, plan)
    display = Display(said=SAID)
    watch = Watch(journal, plan, expected, display.output, SAID)
    if not info.alone:
        _announce(plan, expected, info, display)
    journal.open(info)
    sweeper.watch = watch
    try:
        with journal.lock:
            launch_all(sweeper, watch, display)
    except KeyboardInterrupt:
        watch.look()
        journal.remove()
        tell_interrupted(watch)
        sys.exit(130)
    if not leads():
        journal.remove()
        return
    finish(watch, str(config.paths.results))
    failures = watch.failures
    if not (failures and (journal.folder / "submitit").is_dir()):  # what its jobs have printed
        journal.remove()
    if failures:
        tell_failures(failures, watch, config)
        sys.exit(1)


def workers(config: DictConfig) -> int:
    """How many processes suit this machine: one for each GPU, or for each so many cores."""
    gpus = torch.cuda.device_count() if str(config.device) != "cpu" else 0
    return gpus or max(1, cores() // int(config.threads or 1))


def _combinations(sweeper: "PlannedSweeper", arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of each job, put together as Hydra's own sweeper does."""
    assert sweeper.hydra_context is not None
    parser = OverridesParser.create(sweeper.hydra_context.config_loader)
    overrides = parser.parse_overrides([*sweeper._parse_config(), *arguments])
    for override in overrides:
        if override.is_discrete_sweep() and not list(override.sweep_string_iterator()):
            raise UserError(
                f"{override.get_key_element()} is to take every value that a pattern matches, and "
                "none does; expected one at least: type --help for the groups"
            )
    (batch,) = sweeper.split_arguments(overrides, None)
    return batch


def _check_installed(target: str) -> None:
    plugin = target.split(".")[1] if target.startswith("hydra_plugins.") else ""
    if plugin not in _NEEDS or find_spec(f"hydra_plugins.{plugin}"):
        return
    extra, package = _NEEDS[plugin]
    raise UserError(
        f"hydra/launcher needs {package}, which is not installed; type "
        f"pip install 'robustbench-local[{extra}]'"
    )


def _info(config: DictConfig, plan: Plan) -> Info:
    """What the jobs have to know; launchers that start processes on this machine deal nothing."""
    launcher = config.hydra.launcher
    target = str(launcher._target_)
    gpus: list[str] = []
    count, threads = 1, None
    if target.endswith((".JoblibLauncher", ".submitit_launcher.LocalLauncher")):
        asked = int(launcher.get("n_jobs") or workers(config))
        count = asked if asked > 0 else max(1, cores() + 1 + asked)
        gpus = visible_gpus(os.environ, torch.cuda.device_count())
        if count > 1 and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, cores() // count)
    return Info(
        host=socket.gethostname(),
        pid=os.getpid(),
        folder=os.getcwd(),
        gpus=gpus,
        workers=count,
        threads=threads,
        alone=len(plan.jobs) == 1,
    )


def _announce(plan: Plan, expected: Estimate, info: Info, display: Display) -> None:
    """What is to come, in four lines at most."""
    told = [f"{_count(plan.total, 'run')}, {plan.recorded} of them recorded already"]
    if plan.forced:
        told = [f"{_count(plan.total, 'run')}, all run again (force=true)"]
    if plan.networks:
        told.append(
            f"those to run share {_count(plan.networks, 'trained network')}, {plan.cached} of them "
            "in the cache"
        )
    if plan.to_launch and expected.known:
        each = f" on {info.workers} processes" if info.workers > 1 else " one after the other"
        time = duration(expected.total / info.workers)
        about = "about" if expected.close else "roughly"
        told.append(f"{about} {time}{each} ({expected.rests_on})")
    elif plan.to_launch:
        told.append(f"no estimate of the time: {expected.rests_on}")
    for sentence in told:
        display.output.print(sentence, soft_wrap=True, highlight=False)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

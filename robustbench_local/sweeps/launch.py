"""Launching: all jobs, and again those whose process was killed."""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from robustbench_local.display import Display
from robustbench_local.sweeps.plan import Job
from robustbench_local.sweeps.watch import Watch

if TYPE_CHECKING:
    from hydra_plugins.robustbench_local.planned import PlannedSweeper

TRIES = 3
"""How often a job is launched whose process is killed each time."""


def launch_all(sweeper: "PlannedSweeper", watch: Watch, display: Display) -> None:
    """Returns when every job has ended, one way or another."""
    assert sweeper.config is not None
    target = str(sweeper.config.hydra.launcher._target_)
    size = sweeper.max_batch_size
    if size is None and target.endswith(".submitit_launcher.LocalLauncher"):
        size = watch.journal.info().workers  # it starts everything at once
    # Runs in this process look for themselves: a thread would print between their bars.
    here = target.endswith(".BasicLauncher")
    waiting, number = list(watch.plan.to_launch), 0
    kills: Counter[Job] = Counter()
    with nullcontext() if here else watch.watching():
        while waiting:
            # One that takes its process down takes the others along: by itself it harms none.
            batch = [job for job in waiting if not kills[job]][:size] or waiting[:1]
            watch.expect(number, batch)
            broken = _launch(sweeper, batch, number, submitit=".submitit_launcher." in target)
            number += len(batch)
            again = _left_over(watch, batch, kills, broken)
            if again:
                display.say(
                    f"a process of the sweep was lost ({_name(broken)}); of {len(batch)} runs "
                    f"{len(again)} that had not ended are launched again"
                )
            waiting = [job for job in waiting if job not in batch or job in again]


def _launch(
    sweeper: "PlannedSweeper", batch: Sequence[Job], number: int, *, submitit: bool
) -> Exception | None:
    """What the launcher raises is told in a sentence, beside what the journal says."""
    assert sweeper.launcher is not None
    try:
        with _all_awaited() if submitit else nullcontext():
            sweeper.launcher.launch([list(job.overrides) for job in batch], number)
    except Exception as error:  # of any launcher: a killed process, a queue that refuses
        return error
    return None


def _left_over(
    watch: Watch, batch: Sequence[Job], kills: Counter[Job], broken: Exception | None
) -> list[Job]:
    """The jobs of a batch to launch again; those that were killed too often are given up."""
    _wait_for_survivors(watch, batch)
    left = [job for job in batch if job not in watch.ended and not watch.recover(job)]
    begun = [job for job in left if watch.started(job) is not None]
    kills.update(begun)
    hopeless = [job for job in begun if kills[job] >= TRIES]
    if len(left) == len(batch) and not begun:  # the launcher itself does not work
        hopeless = left
    for job in hopeless:
        watch.give_up(job, _why(broken, kills[job]))
    return [job for job in left if job not in hopeless]


def _wait_for_survivors(watch: Watch, batch: Sequence[Job]) -> None:
    """Where a launcher ended before its jobs: those whose process lives end by themselves."""
    while True:
        watch.look()
        entries = [watch.started(job) for job in batch if job not in watch.ended]
        if not any(entry and entry.lives and entry.pid != os.getpid() for entry in entries):
            return
        time.sleep(0.2)


@contextmanager
def _all_awaited() -> Iterator[None]:
    """Have submitit wait for all jobs before it raises what one of them came to."""
    import submitit

    plain = submitit.AutoExecutor.map_array

    def map_array(self: Any, *arguments: Any) -> list[Any]:
        jobs: list[Any] = plain(self, *arguments)
        for job in jobs:
            job.exception()
        return jobs

    with patch.object(submitit.AutoExecutor, "map_array", map_array):
        yield


def _why(broken: Exception | None, kills: int) -> str:
    if kills:
        return (
            f"its process was killed {kills} times before it could say anything "
            f"({_name(broken)}): out of memory, perhaps"
        )
    return f"it could not be launched ({_name(broken)})"


def _name(broken: Exception | None) -> str:
    if broken is None:
        return "it left no word"
    first = re.split(r"\n|(?<=[.!:]) ", str(broken).strip())[0].rstrip(".:")
    return f"{type(broken).__name__}: {first}" if first else type(broken).__name__

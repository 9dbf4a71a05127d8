"""Progress and sentences on the way; the result itself is `results.report`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from robustbench_local.processes import leads

WIDE = 160
"""Columns of a file or a pipe, where no terminal says how many it has."""


def output() -> Console:
    """Standard output. Tables in a log are not cut to the 80 columns of no terminal."""
    console = Console(quiet=not leads())
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, WIDE)
    return console


class Display:
    """Tables go to standard output, progress and warnings to standard error."""

    def __init__(self) -> None:
        self.output = output()
        self.errors = Console(stderr=True, quiet=not leads())

    def say(self, sentence: str) -> None:
        """One sentence about what is going on."""
        self.errors.print(escape(sentence), style="yellow", soft_wrap=True, highlight=False)

    @contextmanager
    def evaluation(
        self, label: str, n: int, *, accuracy: str = "robust"
    ) -> Iterator[Callable[[int, float], None]]:
        """A bar with the running accuracy; yields what `evaluate` calls after each batch."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        hidden = not self.errors.is_terminal
        with Progress(*columns, console=self.errors, transient=True, disable=hidden) as bar:
            task = bar.add_task(escape(label), total=n)

            def advance(done: int, share: float) -> None:
                text = f"{escape(label)}: {accuracy} {100 * share:.2f}%"
                bar.update(task, advance=done, description=text)

            yield advance

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
    """Tables go to standard output, progress and warnings to standard error.

    Bars are for one process on a terminal: they are left out where it is not `live`. Sentences that
    are `said` already, in the other runs of a sweep, are not repeated; without that set all are.
    """

    def __init__(self, *, live: bool = True, said: set[str] | None = None) -> None:
        self.output = output()
        terminal = None if live else False
        self.errors = Console(stderr=True, quiet=not leads(), force_terminal=terminal)
        self.said = said

    def say(self, sentence: str) -> None:
        """One sentence about what is going on."""
        if self.said is not None:
            if sentence in self.said:
                return
            self.said.add(sentence)
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

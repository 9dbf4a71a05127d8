"""A bar for each epoch, on a terminal only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

Report: TypeAlias = Callable[[int, float, float], None]
"""Called with the steps done in this epoch, the loss, and the training accuracy so far."""


@contextmanager
def epoch_bar(console: "Console | None", epoch: int, epochs: int, steps: int) -> Iterator[Report]:
    """Yield what the loop reports to; without a terminal it shows nothing."""
    if console is None or not console.is_terminal:
        yield lambda done, loss, accuracy: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    title = f"epoch {epoch}/{epochs}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console, transient=epoch < epochs) as bar:
        task = bar.add_task(title, total=steps)

        def report(done: int, loss: float, accuracy: float) -> None:
            text = f"{title}: loss {loss:.3f}, accuracy {accuracy:.1%}"
            bar.update(task, completed=done, description=text)

        yield report

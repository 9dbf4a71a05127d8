"""What Hydra calls around the runs of a sweeper that searches; `planned` does without."""

from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

SAID: set[str] = set()
"""Notes that this command has printed: the runs of a sweep need not say them again."""


class Compare(Callback):
    """Says which run begins, collects the records and has them compared at the end.

    A sweeper that searches decides on the way how many runs there are. A light file: Hydra imports
    it also for `--help`.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.searches = False
        SAID.clear()

    def on_multirun_start(self, config: "DictConfig", **_: Any) -> None:
        """See whose sweep it is."""
        self.searches = not config.hydra.sweeper._target_.endswith(".PlannedSweeper")

    def on_job_start(self, config: "DictConfig", **_: Any) -> None:
        """Head what a run prints with its number and what it is given."""
        if not self.searches:
            return
        from rich.markup import escape

        from robustbench_local.display import output

        heading = f"run {config.hydra.job.num + 1}: {' '.join(config.hydra.overrides.task)}"
        output().print(f"\n{escape(heading)}", style="bold", soft_wrap=True, highlight=False)

    def on_job_end(self, config: "DictConfig", job_return: "JobReturn", **_: Any) -> None:
        """Take the records of a job; one that failed has none."""
        value = getattr(job_return, "_return_value", None)
        searched = config.hydra.sweeper._target_.endswith(".OptunaSearch")  # which tells it itself
        if isinstance(value, list) and not searched:
            self.records += value

    def on_multirun_end(self, config: "DictConfig", **_: Any) -> None:
        """Print and keep the table of several runs."""
        if len({record["run_id"] for record in self.records}) > 1:
            from robustbench_local.results.comparison import compare

            compare(self.records, str(config.paths.results))

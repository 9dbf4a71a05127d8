"""What Hydra calls around a sweep: at its end, one table of all its runs."""

from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig


class Compare(Callback):
    """Collects the records of a sweep's jobs and has them compared.

    A light file: Hydra imports it also for `--help`.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_job_end(self, config: "DictConfig", job_return: "JobReturn", **_: Any) -> None:
        """Take the records of a job; one that failed has none."""
        value = getattr(job_return, "_return_value", None)
        if isinstance(value, list):
            self.records += value

    def on_multirun_end(self, config: "DictConfig", **_: Any) -> None:
        """Print and keep the table of a sweep of several runs."""
        if len({record["run_id"] for record in self.records}) > 1:
            from robustbench_local.results.comparison import compare

            compare(self.records, str(config.paths.results))

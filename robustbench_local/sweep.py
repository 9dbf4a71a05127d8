"""What Hydra calls around the runs: in a sweep a heading for each, and at its end one table."""

import sys
from math import prod
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

SAID: set[str] = set()
"""Notes that this command has printed: the runs of a sweep need not say them again."""


class Compare(Callback):
    """Says which run of a sweep begins, collects the records and has them compared.

    A light file: Hydra imports it also for `--help`.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.total: int | None = 1  # None: as many as a sweeper that searches comes to
        self.fixed: set[str] = set()
        SAID.clear()

    def on_multirun_start(self, config: "DictConfig", **_: Any) -> None:
        """Count the runs as Hydra's own sweeper puts them together; another one may search."""
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            self.total = None
            return
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser

        params = config.hydra.sweeper.get("params") or {}
        words = [f"{key}={value}" for key, value in params.items()]
        choices: dict[str, int] = {}
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        try:
            for override in parser.parse_overrides([*words, *config.hydra.overrides.task]):
                several = override.is_sweep_override()
                values = list(override.sweep_string_iterator()) if several else [""]
                choices[override.get_key_element()] = len(values)  # the last one counts
        except HydraException:  # the sweeper will say it better
            self.total = None
            return
        self.total = prod(choices.values())
        if self.total == 0:
            empty = next(key for key, values in choices.items() if values == 0)
            sys.exit(
                f"error: {empty} is to take every value that a pattern matches, and none does; "
                f"expected one at least: type --help for the groups"
            )
        self.fixed = {key for key, values in choices.items() if values == 1}

    def on_job_start(self, config: "DictConfig", **_: Any) -> None:
        """Head what a run of a sweep prints with its number and what it is given alone."""
        if self.total == 1:
            return
        from rich.markup import escape

        from robustbench_local.display import output

        words = [
            word for word in config.hydra.overrides.task if word.split("=")[0] not in self.fixed
        ]
        of = f" of {self.total}" if self.total else ""
        heading = f"run {config.hydra.job.num + 1}{of}: {' '.join(words)}"
        output().print(f"\n{escape(heading)}", style="bold", soft_wrap=True, highlight=False)

    def on_job_end(self, config: "DictConfig", job_return: "JobReturn", **_: Any) -> None:
        """Take the records of a job; one that failed has none."""
        value = getattr(job_return, "_return_value", None)
        searched = config.hydra.sweeper._target_.endswith(".OptunaSearch")  # which tells it itself
        if isinstance(value, list) and not searched:
            self.records += value

    def on_multirun_end(self, config: "DictConfig", **_: Any) -> None:
        """Print and keep the table of a sweep of several runs."""
        if len({record["run_id"] for record in self.records}) > 1:
            from robustbench_local.results.comparison import compare

            compare(self.records, str(config.paths.results))

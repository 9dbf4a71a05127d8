"""The sweeper `planned`: Hydra's own, with a plan before, a journal during, one account after."""

from collections.abc import Mapping
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PlannedSweeper(BasicSweeper):
    """All combinations of the values given, like Hydra's own sweeper, by any launcher.

    A light file: Hydra imports it also for `--help`. The work is in `robustbench_local.sweeps`.
    """

    def __init__(
        self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(max_batch_size, dict(params or {}))

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Choose the journal and tell the jobs of it, then make the launcher."""
        from robustbench_local.sweeps.sweep import prepare

        self.journal = prepare(config)
        self.watch: Any = None

        def and_look(job: DictConfig) -> Any:
            result = task_function(job)
            if self.watch is not None:
                self.watch.look()
            return result

        here = str(config.hydra.launcher._target_).endswith(".BasicLauncher")
        super().setup(
            hydra_context=hydra_context,
            task_function=and_look if here else task_function,
            config=config,
        )

    def sweep(self, arguments: list[str]) -> None:
        """Plan, launch, tell; exits with 1 where a run failed and 130 after Ctrl-C."""
        from robustbench_local.sweeps.sweep import sweep

        sweep(self, arguments)

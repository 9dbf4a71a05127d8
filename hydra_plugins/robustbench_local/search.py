"""The sweeper `search`: settings chosen by Optuna, for the best robust validation accuracy."""

from collections.abc import Mapping
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSearch(Sweeper):
    """Chooses settings, trial by trial, from what the trials before came to.

    `params` says what may be chosen in Hydra's own words, as the command line does too: choice(),
    range(), interval(), and tag(log, interval()) for what is spread over orders of magnitude. The
    study lies in a file in the folder `storage`: the same command goes on with it, up to `n_trials`
    in all. `n_jobs` trials at once are handed to the launcher. `startup` of them are drawn at
    random before Optuna's TPE takes over.

    A light file: Hydra imports it also for `--help`. The work is in `robustbench_local.search`.
    """

    def __init__(
        self,
        *,
        n_trials: int,
        n_jobs: int,
        seed: int,
        startup: int,
        storage: str,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.n_trials, self.n_jobs, self.seed, self.startup = n_trials, n_jobs, seed, startup
        self.storage = storage
        self.params = dict(params or {})
        self.launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search, and print the best settings as words to type."""
        from robustbench_local.search import from_hydra

        from_hydra(self, arguments)

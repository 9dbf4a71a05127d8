"""MLflow: a run for every record, in a local store or on a server."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from robustbench_local.tracking.tracker import Entry, Tracker

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG = "robustbench_local.run_id"
"""By which runs are found again: what has it and is finished is not logged twice."""

_AT_ONCE = 100
"""Parameters in one request; a server takes no more."""

_LONGEST = 500
"""Characters of a parameter that every server takes; the artifact has all of them."""


@dataclass(frozen=True, kw_only=True)
class MLflow(Tracker):
    """Parameters, metrics, tags, and the record as the artifact `record.json`.

    - `uri`: of a server or a store as MLflow writes it; None: the folder `mlruns` below the
      results.
    - `experiment`: its name, which is created where it does not exist.

    A server that does not answer is asked a second time and no more, unless MLflow's own variables
    in the environment say otherwise.
    """

    needs: ClassVar[str] = "'robustbench-local[mlflow]'"

    uri: str | None = None
    experiment: str = "robustbench-local"

    def load(self) -> object:
        """Import the client."""
        from mlflow.tracking import MlflowClient  # takes seconds

        return MlflowClient

    def log(self, entry: Entry, results: Path) -> None:
        """Log a run, unless one that is finished has its id; one that fails is marked so."""
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        # By default it would ask for minutes, while the next run waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        client = MlflowClient(self.uri or (results.absolute() / "mlruns").as_uri())
        place = self._place(client)
        known = f"tags.`{TAG}` = '{entry.run_id}' and attributes.status = 'FINISHED'"
        if client.search_runs([place], known, max_results=1):
            return
        tags = {TAG: entry.run_id, **entry.tags()}
        run = client.create_run(place, run_name=entry.name, tags=tags).info.run_id
        try:
            parameters = [
                Param(_allowed(key), str(value)[:_LONGEST])
                for key, value in entry.parameters().items()
            ]
            for first in range(0, len(parameters), _AT_ONCE):
                client.log_batch(run, params=parameters[first : first + _AT_ONCE])
            now = int(1000 * time.time())
            for step, numbers in [(0, entry.metrics()), *entry.epoch_metrics()]:
                client.log_batch(
                    run, [Metric(_allowed(key), value, now, step) for key, value in numbers.items()]
                )
            client.log_dict(run, entry.record, "record.json")
        except BaseException:
            client.set_terminated(run, "FAILED")
            raise
        client.set_terminated(run)

    def _place(self, client: "MlflowClient") -> str:
        found = client.get_experiment_by_name(self.experiment)
        made = client.create_experiment(self.experiment) if found is None else found.experiment_id
        return str(made)


def _allowed(key: str) -> str:
    """A key without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-. /]", "_", key)[:250]

"""A training that other processes run, stop and kill; no test itself."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from training_data import CPU, make_data, small_network

from robustbench_local import leases
from robustbench_local.defenses import Standard
from robustbench_local.training import Schedule, Trained, fit

SCHEDULE = Schedule(epochs=4, batch_size=16, learning_rate=0.01, average_decay=0.9,
                    augmentation="crop_flip")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Interrupted(Standard):
    """Kills its own process at a step, or waits there for a file, as the environment says."""

    def loss(self, model, step):
        if str(step.number) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        stopped = os.environ.get("STOP_AT", "").partition(" ")  # "STEP FILE", once
        if str(step.number) == stopped[0] and not Path(stopped[2]).exists():
            Path(stopped[2]).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        meeting = os.environ.get("MEET_IN")
        if meeting and step.number == 0:
            Path(meeting, f"started-{os.getpid()}").touch()
            while not Path(meeting, "go").exists():
                time.sleep(0.02)
        return super().loss(model, step)


def run(cache: Path, console: Console | None = None) -> Trained:
    return fit(small_network, make_data(), Interrupted(), SCHEDULE, seed=3, device=CPU,
               cache=cache, key={"model": "small"}, console=console)  # fmt: skip


def main() -> None:
    if lease := os.environ.get("LEASE"):
        leases.LEASE, leases.HEARTBEAT = float(lease), float(lease) / 4
    trained = run(Path(sys.argv[1]), Console(file=sys.stderr))
    print(json.dumps({"cached": trained.cached, "sha256": trained.sha256}))

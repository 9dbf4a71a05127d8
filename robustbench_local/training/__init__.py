"""Training: one loop, a cache of weights, and warnings where a training went wrong."""

from robustbench_local.training.fit import Trained, fit
from robustbench_local.training.identity import weights_key
from robustbench_local.training.loop import TrainingDiverged
from robustbench_local.training.schedule import Schedule
from robustbench_local.training.workshop import Workshop

__all__ = ["Schedule", "Trained", "TrainingDiverged", "Workshop", "fit", "weights_key"]

"""Training: one loop, a cache of weights, and warnings where a training went wrong."""

from robustbench_local.training.fit import Trained, fit
from robustbench_local.training.identity import weights_key
from robustbench_local.training.loop import TrainingDiverged
from robustbench_local.training.schedule import Schedule

__all__ = ["Schedule", "Trained", "TrainingDiverged", "fit", "weights_key"]

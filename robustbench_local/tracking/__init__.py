"""Telling MLflow or TensorBoard of finished runs, `tracking=NAME`."""

from robustbench_local.tracking.ml_flow import MLflow
from robustbench_local.tracking.tensor_board import TensorBoard
from robustbench_local.tracking.tracker import Tracker, build_tracker, track

__all__ = ["MLflow", "TensorBoard", "Tracker", "build_tracker", "track"]

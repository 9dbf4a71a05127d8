"""Networks, their normalisation, and building one from a configuration."""

from robustbench_local.models.build import build_model, check_model, model_key
from robustbench_local.models.checkpoint import load_checkpoint
from robustbench_local.models.mlp import MLP
from robustbench_local.models.normalize import Normalize, Normalized, pixel_statistics
from robustbench_local.models.preact_resnet import PreActResNet18
from robustbench_local.models.resnet import ResNet
from robustbench_local.models.small_cnn import SmallCNN

__all__ = [
    "MLP",
    "Normalize",
    "Normalized",
    "PreActResNet18",
    "ResNet",
    "SmallCNN",
    "build_model",
    "check_model",
    "load_checkpoint",
    "model_key",
    "pixel_statistics",
]

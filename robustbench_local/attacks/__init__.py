"""Attacks: one file per family. A new one is a file here and a YAML in conf/attack/."""

from robustbench_local.attacks.art_library import ART
from robustbench_local.attacks.base import Attack
from robustbench_local.attacks.gradient import PGD
from robustbench_local.attacks.noise import Noise
from robustbench_local.attacks.sparse_l1_descent import SparseL1Descent
from robustbench_local.attacks.spatial import Spatial
from robustbench_local.attacks.torchattacks_library import TorchAttacks

__all__ = ["ART", "PGD", "Attack", "Noise", "SparseL1Descent", "Spatial", "TorchAttacks"]

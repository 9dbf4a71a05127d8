"""Attacks: one file per family. A new one is a file here and a YAML in conf/attack/."""

from robustbench_local.attacks.apgd import APGD
from robustbench_local.attacks.art_library import ART
from robustbench_local.attacks.autoattack import AutoAttack
from robustbench_local.attacks.base import Attack
from robustbench_local.attacks.cascade import Cascade
from robustbench_local.attacks.cw import CW
from robustbench_local.attacks.ddn import DDN
from robustbench_local.attacks.deepfool import DeepFool
from robustbench_local.attacks.fmn import FMN
from robustbench_local.attacks.gradient import PGD
from robustbench_local.attacks.momentum import Momentum
from robustbench_local.attacks.noise import Noise
from robustbench_local.attacks.one_pixel import OnePixel
from robustbench_local.attacks.one_pixel_exhaustive import OnePixelExhaustive
from robustbench_local.attacks.sparse_l1_descent import SparseL1Descent
from robustbench_local.attacks.spatial import Spatial
from robustbench_local.attacks.square import Square
from robustbench_local.attacks.substitute import Substitute
from robustbench_local.attacks.torchattacks_library import TorchAttacks
from robustbench_local.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "ART",
    "CW",
    "DDN",
    "FMN",
    "PGD",
    "Attack",
    "AutoAttack",
    "Cascade",
    "DeepFool",
    "Momentum",
    "Noise",
    "OnePixel",
    "OnePixelExhaustive",
    "SparseL1Descent",
    "Spatial",
    "Square",
    "Substitute",
    "TorchAttacks",
    "Transfer",
]

"""Attacks: one file per family. A new one is a file here and a YAML in conf/attack/."""

from robustbench_local.attacks.apgd import APGD
from robustbench_local.attacks.autoattack import AutoAttack
from robustbench_local.attacks.base import Attack
from robustbench_local.attacks.cascade import Cascade
from robustbench_local.attacks.gradient import PGD
from robustbench_local.attacks.noise import Noise

__all__ = ["APGD", "PGD", "Attack", "AutoAttack", "Cascade", "Noise"]

"""Attacks: one file per family. A new one is a file here and a YAML in conf/attack/."""

from robustbench_local.attacks.base import Attack
from robustbench_local.attacks.gradient import PGD
from robustbench_local.attacks.momentum import Momentum
from robustbench_local.attacks.noise import Noise
from robustbench_local.attacks.substitute import Substitute
from robustbench_local.attacks.transfer import Transfer

__all__ = ["PGD", "Attack", "Momentum", "Noise", "Substitute", "Transfer"]

"""Attacks: one file per family. A new one is a file here and a YAML in conf/attack/."""

from robustbench_local.attacks.base import Attack
from robustbench_local.attacks.gradient import PGD
from robustbench_local.attacks.noise import Noise
from robustbench_local.attacks.one_pixel import OnePixel
from robustbench_local.attacks.one_pixel_exhaustive import OnePixelExhaustive

__all__ = ["PGD", "Attack", "Noise", "OnePixel", "OnePixelExhaustive"]

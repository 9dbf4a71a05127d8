"""Defenses: a recipe decides the weights, a wrap what the attacker faces.

A new one is a file here and a YAML in conf/defense/.
"""

from robustbench_local.defenses.adversarial_training import AdversarialRecipe, AdversarialTraining
from robustbench_local.defenses.augmentation import AugmentedTraining
from robustbench_local.defenses.awp import AWP
from robustbench_local.defenses.defense import Defense, Wrapped, Wrapper
from robustbench_local.defenses.distillation import Distillation
from robustbench_local.defenses.fast_adversarial_training import FastAdversarialTraining
from robustbench_local.defenses.free_adversarial_training import FreeAdversarialTraining
from robustbench_local.defenses.mart import Mart
from robustbench_local.defenses.mixing import Mixing
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.recipe import Criterion, Objective, Recipe, Standard
from robustbench_local.defenses.trades import DivergenceAscent, Trades

__all__ = [
    "AWP",
    "AdversarialRecipe",
    "AdversarialTraining",
    "AugmentedTraining",
    "Criterion",
    "Defense",
    "Distillation",
    "DivergenceAscent",
    "FastAdversarialTraining",
    "FreeAdversarialTraining",
    "Mart",
    "Mixing",
    "Objective",
    "Preprocess",
    "Recipe",
    "Standard",
    "Trades",
    "Wrapped",
    "Wrapper",
]

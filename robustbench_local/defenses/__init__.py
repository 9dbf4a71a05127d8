"""Defenses: a recipe decides the weights, a wrap what the attacker faces.

A new one is a file here and a YAML in conf/defense/.
"""

from robustbench_local.defenses.adversarial_training import AdversarialRecipe, AdversarialTraining
from robustbench_local.defenses.art_adapter import ArtPreprocessor
from robustbench_local.defenses.art_detector import ArtDetector
from robustbench_local.defenses.augmentation import AugmentedTraining
from robustbench_local.defenses.awp import AWP
from robustbench_local.defenses.bilateral import Bilateral
from robustbench_local.defenses.defense import (
    Defense,
    Regularizer,
    Wrapped,
    Wrapper,
    declared_samples,
)
from robustbench_local.defenses.denoiser import Denoiser
from robustbench_local.defenses.detection import (
    Calibration,
    Detecting,
    Detector,
    Scorer,
    describe_detection,
)
from robustbench_local.defenses.detector_network import DetectorNetwork
from robustbench_local.defenses.distillation import Distillation
from robustbench_local.defenses.fast_adversarial_training import FastAdversarialTraining
from robustbench_local.defenses.feature_squeezing import FeatureSqueezing
from robustbench_local.defenses.feature_squeezing_detector import FeatureSqueezingDetector
from robustbench_local.defenses.free_adversarial_training import FreeAdversarialTraining
from robustbench_local.defenses.gaussian import Gaussian
from robustbench_local.defenses.jpeg import Jpeg, JpegRandom, JpegSlq, JpegVote
from robustbench_local.defenses.mart import Mart
from robustbench_local.defenses.median import Median
from robustbench_local.defenses.mixing import Mixing
from robustbench_local.defenses.noise_fusion import NoiseFusion
from robustbench_local.defenses.non_local_means import NonLocalMeans
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.quantize import BitDepth, Quantize
from robustbench_local.defenses.randomized_smoothing import RandomizedSmoothing
from robustbench_local.defenses.recipe import Objective, Recipe, Standard
from robustbench_local.defenses.resize_pad import ResizePad
from robustbench_local.defenses.rse import RSE
from robustbench_local.defenses.sap import SAP
from robustbench_local.defenses.temperature import Temperature
from robustbench_local.defenses.total_variation import TotalVariation
from robustbench_local.defenses.trades import DivergenceAscent, Trades
from robustbench_local.defenses.trial import check_defense
from robustbench_local.training.step import Criterion, Step

__all__ = [
    "AWP",
    "RSE",
    "SAP",
    "AdversarialRecipe",
    "AdversarialTraining",
    "ArtDetector",
    "ArtPreprocessor",
    "AugmentedTraining",
    "Bilateral",
    "BitDepth",
    "Calibration",
    "Criterion",
    "Defense",
    "Denoiser",
    "Detecting",
    "Detector",
    "DetectorNetwork",
    "Distillation",
    "DivergenceAscent",
    "FastAdversarialTraining",
    "FeatureSqueezing",
    "FeatureSqueezingDetector",
    "FreeAdversarialTraining",
    "Gaussian",
    "Jpeg",
    "JpegRandom",
    "JpegSlq",
    "JpegVote",
    "Mart",
    "Median",
    "Mixing",
    "NoiseFusion",
    "NonLocalMeans",
    "Objective",
    "Preprocess",
    "Quantize",
    "RandomizedSmoothing",
    "Recipe",
    "Regularizer",
    "ResizePad",
    "Scorer",
    "Standard",
    "Step",
    "Temperature",
    "TotalVariation",
    "Trades",
    "Wrapped",
    "Wrapper",
    "check_defense",
    "declared_samples",
    "describe_detection",
]

"""Datasets as uint8 tensors on the device, with fixed splits and fingerprints."""

from robustbench_local.data.arrays import Npz
from robustbench_local.data.dataset import Dataset, Split, load
from robustbench_local.data.folder import ImageFolder
from robustbench_local.data.official import CIFAR10, MNIST, FashionMNIST
from robustbench_local.data.source import Raw, Source

__all__ = [
    "CIFAR10",
    "MNIST",
    "Dataset",
    "FashionMNIST",
    "ImageFolder",
    "Npz",
    "Raw",
    "Source",
    "Split",
    "load",
]

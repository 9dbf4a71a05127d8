"""Feature squeezing as a detector: images whose prediction changes when they are simplified."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustbench_local.defenses.detection import Detector, Scorer
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.settings import require_kind
from robustbench_local.errors import UserError
from robustbench_local.types import Images, Logits, Model


@dataclass(frozen=True, kw_only=True)
class FeatureSqueezingDetector(Detector):
    """Feature squeezing (Xu, Evans and Qi 2018, arXiv:1704.01155).

    The distance of an image is the largest L1 distance, over the `squeezers`, between the
    probabilities of the image and those of the squeezed image, from 0 to 2. The score is its
    log-odds form, ln(distance / (2 - distance)): the same images are rejected, and the gradient
    does not vanish where the softmax saturates. A `threshold` t stands for the distance
    2 / (1 + exp(-t)).

    - `squeezers`: transforms by name, each with its own BPDA surrogate; in the paper 1 bit and a
      2x2 median on MNIST, 5 bits, a 2x2 median and non-local means 13-3-2 on CIFAR-10.
    - `false_positive_rate`: see `Detector`; 0.05 in the paper, there of training images.
    """

    called: ClassVar[str] = "feature_squeezing_detector"

    squeezers: Mapping[str, Preprocess]

    def __post_init__(self) -> None:
        super().__post_init__()
        key = f"defense.wrap.{self.called}.squeezers"
        require_kind(
            key,
            self.squeezers,
            Mapping,
            expected="transforms of the pixels by name",
            example=".median._target_=robustbench_local.defenses.Median",
        )
        # Plain ones: a configuration brings its own kinds of mapping.
        squeezers = {str(name): squeezer for name, squeezer in self.squeezers.items()}
        object.__setattr__(self, "squeezers", squeezers)
        if not squeezers:
            raise UserError(
                f"{key} is empty; expected one transform at least: type "
                f"+{key}.median._target_=robustbench_local.defenses.Median"
            )
        for name, squeezer in squeezers.items():
            if not isinstance(squeezer, Preprocess):
                raise UserError(
                    f"{key}.{name} is a {type(squeezer).__name__}; expected a transform of the "
                    f"pixels: type {key}.{name}._target_=robustbench_local.defenses.Median"
                )

    def scorer(self) -> Scorer:
        """See `Squeezing`."""
        return Squeezing(copy.deepcopy(squeezer) for squeezer in self.squeezers.values())


class Squeezing(Scorer):
    """The largest distance over all squeezers, in its log-odds form."""

    def __init__(self, squeezers: Iterable[Preprocess]) -> None:
        super().__init__()
        self.squeezers = nn.ModuleList(squeezers)

    def forward(self, model: Model, x: Images, logits: Logits) -> Tensor:
        """See `Scorer`."""
        # In float64: small distances are differences of nearly equal probabilities.
        plain = logits.double().log_softmax(1)
        distances = [
            log_odds_distance(plain, model(squeezer(x)).double().log_softmax(1))
            for squeezer in self.squeezers
        ]
        return torch.stack(distances).amax(0).to(logits.dtype)


def log_odds_distance(first: Tensor, second: Tensor) -> Tensor:
    """ln(d / (2 - d)) of the L1 distance d of probabilities, given by their logarithms (N, K).

    Half of 2 - d is what both have in common, the sum of the smaller probabilities: exact also
    where d rounds to 2. Distances below 2e-12 count as that.
    """
    apart = (first.exp() - second.exp()).abs().sum(1) / 2
    return apart.clamp(min=1e-12).log() - torch.minimum(first, second).logsumexp(1)

"""What the filters are worth against an attack that knows them, on digits at linf 0.3."""

import pytest
from conftest import accuracy
from torch import Tensor, nn

from robustbench_local.attacks import PGD
from robustbench_local.defenses import (
    Bilateral,
    BitDepth,
    Defense,
    FeatureSqueezing,
    Gaussian,
    Median,
    NonLocalMeans,
    Preprocess,
    Quantize,
    ResizePad,
    TotalVariation,
)
from robustbench_local.randomness import reseed
from robustbench_local.threat import ThreatModel

THREAT = ThreatModel(norm="linf", epsilon=0.3)


def robust(victim: nn.Module, x: Tensor, y: Tensor, *, steps: int = 20, samples: int = 1) -> float:
    """Accuracy under PGD, with draws that the attack has not seen."""
    reseed(victim, 1)
    x_adv = PGD(steps=steps, step_size=2.5 / steps, eot_samples=samples)(victim, x, y, THREAT)
    THREAT.check(x_adv, x)
    reseed(victim, 2)
    return accuracy(victim, x_adv, y)


@pytest.mark.parametrize(
    "part",
    [
        Median(size=2),
        Median(size=3),
        Gaussian(),
        Bilateral(),
        TotalVariation(steps=20),
        NonLocalMeans(search=5),
        BitDepth(bits=2),
        BitDepth(bits=4),
        Quantize(levels=3),
        Quantize(levels=20),
        FeatureSqueezing(bits=4),
        ResizePad(eot_samples=5),
    ],
    ids=lambda part: type(part).__name__,
)
def test_an_undefended_network_behind_it_falls(
    part: Preprocess, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (each[:100] for each in digit_images)
    victim = Defense(wrap={"part": part}).apply(digit_model)
    assert accuracy(victim, x, y) >= 0.85
    assert robust(victim, x, y, samples=part.eot_samples if part.randomized else 1) <= 0.05


def test_one_bit_holds_since_only_grey_pixels_can_be_turned(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """No gradient is hidden: linf 0.3 does not carry a pixel of 0.2 or less across 0.5."""
    x, y = (each[:100] for each in digit_images)
    one_bit = BitDepth(bits=1)
    victim = Defense(wrap={"bits": one_bit}).apply(digit_model)
    x_adv = PGD(steps=40, step_size=0.1, best_iterate=False, early_stop=False)(victim, x, y, THREAT)
    turned = one_bit(x_adv) != one_bit(x)
    grey = (x >= 0.2 - 1e-6) & (x <= 0.8 + 1e-6)
    assert turned.any() and not (turned & ~grey).any()
    assert accuracy(victim, x_adv, y) >= 0.5


def test_the_median_ignored_looks_stronger_than_it_is(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (each[:100] for each in digit_images)
    victim = Defense(wrap={"median": Median(size=3)}).apply(digit_model)
    threat = ThreatModel(norm="linf", epsilon=0.2)
    attack = PGD(steps=20, step_size=0.125)
    oblivious, adaptive = (
        accuracy(victim, attack(seen, x, y, threat), y) for seen in (digit_model, victim)
    )
    assert adaptive <= oblivious - 0.2

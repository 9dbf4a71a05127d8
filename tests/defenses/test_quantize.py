"""Fewer grey levels, and feature squeezing, beside NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from robustbench_local.defenses import BitDepth, FeatureSqueezing, Preprocess, Quantize
from robustbench_local.errors import UserError


def every_pixel() -> Tensor:
    """All levels of 8 bits, what lies between them, and the half-way pixels of 1 to 8 bits."""
    between = torch.rand(512, generator=torch.Generator().manual_seed(0))
    half_way = (torch.arange(255) + 0.5) / 255
    return torch.cat((torch.arange(256) / 255, between, half_way, torch.tensor([0.5]))).view(
        1, 1, 32, 32
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_depth_is_the_papers_formula(bits: int) -> None:
    x = every_pixel()
    steps = np.float32(2**bits - 1)
    expected = np.rint(x.numpy() * steps) / steps
    np.testing.assert_array_equal(BitDepth(bits=bits)(x).numpy(), expected)
    assert len(np.unique(expected)) == 2**bits


def test_8_bits_leave_pictures_as_they_are() -> None:
    x = (torch.arange(256) / 255).view(1, 1, 16, 16)
    assert torch.equal(BitDepth(bits=8)(x), x)


def test_a_number_of_levels_is_that_many_equal_steps() -> None:
    x = every_pixel()
    assert torch.equal(Quantize(levels=8)(x), BitDepth(bits=3)(x))
    found = Quantize(levels=20)(x).unique()
    torch.testing.assert_close(found, torch.linspace(0, 1, 20))


@pytest.mark.parametrize("levels", [[0, 1], [0.1, 0.15, 0.7], np.arange(0.025, 1, 0.05).tolist()])
def test_listed_levels_take_the_nearest(levels: list[float]) -> None:
    x = torch.cat((every_pixel().flatten(), torch.tensor([0.5, 0.125, 0.425])))
    distance = np.abs(x.double().numpy()[:, None] - np.asarray(levels))
    near = np.asarray(levels)[distance.argmin(1)]  # the first, hence darker one where both are near
    ours = Quantize(levels=levels)(x.view(1, 1, 1, -1)).flatten().numpy()
    unsure = np.partition(distance, 1)[:, :2]
    clear = np.abs(unsure[:, 0] - unsure[:, 1]) > 1e-6
    np.testing.assert_allclose(ours[clear], near[clear], rtol=1e-6)
    assert clear.sum() > 1000 and set(ours) <= set(np.float32(levels))


def test_a_half_way_pixel_becomes_the_darker_listed_level() -> None:
    half = torch.full((1, 1, 1, 1), 0.5)
    assert Quantize(levels=[0.25, 0.75])(half).item() == 0.25
    assert Quantize(levels=[0, 1])(half).item() == BitDepth(bits=1)(half).item() == 0


def test_the_self_study_courses_levels_cut_at_every_twentieth() -> None:
    """Its thermometer tells two pixels apart where a multiple of 1/20 lies between them."""
    x = torch.rand(1, 1, 1, 1000, generator=torch.Generator().manual_seed(1))
    ours = Quantize(levels=[(step + 0.5) / 20 for step in range(20)])(x).flatten()
    thermometer = (x.flatten()[:, None] < (torch.arange(20) + 1) / 20).sum(1)
    torch.testing.assert_close(ours, (20 - thermometer + 0.5) / 20)


@pytest.mark.parametrize("transform", [BitDepth(bits=2), Quantize(levels=[0.2, 0.5])])
def test_the_gradient_is_the_identitys(transform: Preprocess) -> None:
    x = every_pixel().requires_grad_()
    weight = torch.rand(1, 1, 32, 32)
    (gradient,) = torch.autograd.grad((transform(x) * weight).sum(), x)
    assert torch.equal(gradient, weight)


@pytest.mark.parametrize(("bits", "size"), [(1, 2), (5, 2), (4, 3)])
def test_feature_squeezing_is_bits_then_scipys_median(bits: int, size: int) -> None:
    x = torch.rand(2, 3, 33, 30, generator=torch.Generator().manual_seed(2))
    steps = np.float32(2**bits - 1)
    fewer = np.rint(x.numpy() * steps) / steps
    expected = ndimage.median_filter(fewer, size=(1, 1, size, size), mode="reflect")
    ours = FeatureSqueezing(bits=bits, size=size)(x)
    np.testing.assert_array_equal(ours.numpy(), expected)


@pytest.mark.parametrize(
    "levels", [1, 2.5, "20", [0.5], [], [0, 1.5], [-0.1, 1], [1, 0], [0, 0, 1], [0, "1"], [0, True]]
)
def test_levels_that_are_none_are_told(levels: object) -> None:
    with pytest.raises(UserError, match=r"quantize\.levels=.*a list of levels.*type defense\.wrap"):
        Quantize(levels=levels)  # type: ignore[arg-type]

"""The classical filters beside SciPy, scikit-image and their definitions."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from robustbench_local.defenses import (
    Bilateral,
    FeatureSqueezing,
    Gaussian,
    Median,
    NonLocalMeans,
    Preprocess,
    TotalVariation,
)
from robustbench_local.errors import UserError

SHAPES = [(2, 1, 28, 28), (3, 3, 33, 30), (1, 3, 3, 2)]

FILTERS = [
    Median(size=3),
    Gaussian(sigma=1.65),  # a kernel whose weights sum to more than 1 in float32
    Bilateral(sigma_color=0.3),
    TotalVariation(steps=7),
    NonLocalMeans(search=5, strength=0.2),
    FeatureSqueezing(bits=3),
]


def images(*shape: int, seed: int = 0) -> Tensor:
    """Random images, a part of their pixels exactly 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    return (1.6 * torch.rand(shape, generator=generator) - 0.3).clamp(0, 1)


def gradient_of(transform: Preprocess, x: Tensor, weight: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((transform(x) * weight).sum(), x)
    return gradient


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_median_is_scipys(size: int, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    np.testing.assert_array_equal(Median(size=size)(x).numpy(), expected)
    # Where a gradient is wanted the median is found in another way.
    tracked = Median(size=size)(x.clone().requires_grad_())
    np.testing.assert_array_equal(tracked.detach().numpy(), expected)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_gradient_of_the_median_goes_to_the_pixel_chosen(size: int) -> None:
    x = torch.rand(1, 1, 9, 8, generator=torch.Generator().manual_seed(size))  # all different
    chosen = Median(size=size)(x).flatten()
    weight = torch.rand(9, 8)
    expected = torch.zeros(72)
    for value, share in zip(chosen, weight.flatten(), strict=True):
        expected[x.flatten() == value] += share
    torch.testing.assert_close(gradient_of(Median(size=size), x, weight).flatten(), expected)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0, 1.65, 3.3])
def test_gaussian_is_scipys(sigma: float) -> None:
    x = images(2, 3, 33, 30)
    expected = ndimage.gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode="mirror", truncate=4)
    np.testing.assert_allclose(Gaussian(sigma=sigma)(x).numpy(), expected, atol=1e-6)


def mirrored_window(x: np.ndarray, row: int, column: int, reach: int) -> np.ndarray:
    """The (C, 2 reach + 1, 2 reach + 1) pixels around a pixel of (C, H, W)."""
    wide = np.pad(x, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    return wide[:, row : row + 2 * reach + 1, column : column + 2 * reach + 1]


PIXELS = [(0, 0), (3, 0), (7, 8), (11, 12), (6, 5)]
"""Of a 12x13 image: corners, an edge, the middle."""


@pytest.mark.parametrize("channels", [1, 3])
def test_bilateral_is_its_definition(channels: int) -> None:
    x = images(2, channels, 12, 13)
    ours = Bilateral(size=5, sigma_space=1.2, sigma_color="0.4")(x).numpy()
    rows, columns = np.mgrid[-2:3, -2:3]
    near = np.exp(-(rows**2 + columns**2) / (2 * 1.2**2))
    for number, (row, column) in [(n, pixel) for n in (0, 1) for pixel in PIXELS]:
        image = x[number].double().numpy()
        window = mirrored_window(image, row, column, 2)
        unlike = np.abs(window - image[:, row, column, None, None]).sum(0)
        weight = near * np.exp(-(unlike**2) / (2 * 0.4**2))
        expected = (window * weight).sum((1, 2)) / weight.sum()
        np.testing.assert_allclose(ours[number, :, row, column], expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_non_local_means_are_their_definition(channels: int) -> None:
    x = images(2, channels, 12, 13)
    ours = NonLocalMeans(search=5, patch=3, strength=0.3)(x).numpy()
    for number, (row, column) in [(n, pixel) for n in (0, 1) for pixel in PIXELS]:
        window = mirrored_window(x[number].double().numpy(), row, column, 3)
        patch = window[:, 2:5, 2:5]
        total = weights = 0
        for down, right in np.ndindex(5, 5):
            other = window[:, down : down + 3, right : right + 3]
            weight = np.exp(-((other - patch) ** 2).mean() / 0.3**2)
            total, weights = total + weight * other[:, 1, 1], weights + weight
        np.testing.assert_allclose(ours[number, :, row, column], total / weights, atol=1e-6)


@pytest.mark.parametrize(("weight", "steps"), [(0.1, 50), (0.3, 5)])
def test_total_variation_is_scikit_images(weight: float, steps: int) -> None:
    x = images(2, 3, 33, 30)
    ours = TotalVariation(weight=weight, steps=steps)(x).numpy()
    for image, denoised in zip(x.double().numpy(), ours, strict=True):
        theirs = denoise_tv_chambolle(image, weight, eps=0, max_num_iter=steps + 1, channel_axis=0)
        np.testing.assert_allclose(denoised, theirs, atol=1e-5)


def test_total_variation_reaches_the_optimum_of_two_pixels() -> None:
    """Both move towards each other by the weight, and meet."""
    x = torch.tensor([[[[0.2, 0.9]]], [[[0.5, 0.4]]]])
    expected = torch.tensor([[[[0.3, 0.8]]], [[[0.45, 0.45]]]])
    torch.testing.assert_close(TotalVariation(weight=0.1, steps=2000)(x), expected)


@pytest.mark.parametrize("transform", FILTERS, ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_a_flat_image_stays_and_keeps_a_gradient_everywhere(
    transform: Preprocess, level: float
) -> None:
    x = torch.full((2, 3, 12, 11), level)
    out = transform(x)
    assert torch.allclose(out, (x * 7).round() / 7 if "Squeezing" in repr(transform) else x)
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    gradient = gradient_of(transform, x, torch.ones_like(x))
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(), torch.tensor(float(x.numel())))


@pytest.mark.parametrize("transform", FILTERS[1:5], ids=lambda part: type(part).__name__)
def test_the_gradient_is_the_slope(transform: Preprocess) -> None:
    x = 0.1 + 0.8 * torch.rand(1, 2, 9, 8, generator=torch.Generator().manual_seed(3)).double()
    assert torch.autograd.gradcheck(transform, x.requires_grad_(), eps=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("transform", "told"),
    [
        (Gaussian(sigma=2.0), "gaussian.sigma=2.0 looks 8 pixels"),
        (Bilateral(size=17), "bilateral.size=17 looks 8 pixels"),
        (NonLocalMeans(search=15, patch=3), "nlm.search=15 looks 8 pixels"),
    ],
)
def test_windows_larger_than_the_image_are_told(transform: Preprocess, told: str) -> None:
    transform(torch.rand(1, 1, 9, 9))
    with pytest.raises(UserError, match=rf"{told}.*have 9x8; expected a reach below 8: type"):
        transform(torch.rand(1, 1, 9, 8))


def test_strengths_may_be_fractions() -> None:
    assert NonLocalMeans(strength="2/255").strength == 2 / 255
    for wrong in ("two", "1/0", 0, "-1/255", float("nan"), float("inf"), True, None):
        with pytest.raises(UserError, match=r"nlm\.strength=.*: type defense\.wrap\.nlm\.strength"):
            NonLocalMeans(strength=wrong)  # type: ignore[arg-type]

"""Random resizing and padding beside torch's own `interpolate` and `pad`."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from robustbench_local.defenses import ResizePad
from robustbench_local.errors import UserError


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def all_of(
    x: Tensor, canvas: tuple[int, int], least: int
) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """(rows, top, left) and the picture, for every size and place of one image (1, C, H, W)."""
    height, width = canvas
    for rows in range(least, height):
        columns = min(width - 1, round(rows * width / height))
        small = interpolate(x, (rows, columns), mode="bilinear")
        for top in range(height - rows + 1):
            for left in range(width - columns + 1):
                margins = (left, width - columns - left, top, height - rows - top)
                yield (rows, top, left), pad(small, margins)


def find(out: Tensor, x: Tensor, canvas: tuple[int, int], least: int) -> tuple[int, int, int]:
    """What was drawn for an image, by comparing with all that could be."""
    pictures = list(all_of(x, canvas, least))
    distances = torch.stack([(picture - out).abs().max() for _, picture in pictures])
    assert distances.min() < 1e-5
    return pictures[int(distances.argmin())][0]


@pytest.mark.parametrize(
    ("shape", "options", "canvas", "least"),
    [
        ((12, 1, 28, 28), {}, (28, 28), 25),
        ((6, 3, 33, 30), {}, (33, 30), 30),
        ((6, 3, 32, 32), {"output": 331 / 299}, (35, 35), 32),
        ((6, 1, 20, 24), {"output": 0.5, "smallest": 0.5}, (10, 12), 5),
        ((4, 1, 4, 4), {}, (4, 4), 3),
    ],
)
def test_it_is_resizing_and_padding(
    shape: tuple[int, ...], options: dict[str, float], canvas: tuple[int, int], least: int
) -> None:
    x = images(*shape)
    out = ResizePad(**options)(x)
    assert out.shape == (*shape[:2], *canvas)
    drawn = {find(out[n : n + 1], x[n : n + 1], canvas, least) for n in range(len(x))}
    assert len(drawn) > 1  # not one draw for the whole batch


def test_sizes_are_equally_likely_and_places_too() -> None:
    count = 4000
    x = images(1, 1, 10, 10).expand(count, 1, 10, 10)
    drawn = ResizePad(smallest=0.7)(x)
    pictures = list(all_of(x[:1], (10, 10), 7))
    table = torch.cat([picture for _, picture in pictures]).flatten(1)
    seen = torch.cdist(drawn.flatten(1), table).argmin(1)
    places = Counter(pictures[index][0] for index in seen.tolist())
    for rows in (7, 8, 9):
        share = sum(number for (size, _, _), number in places.items() if size == rows) / count
        assert share == pytest.approx(1 / 3, abs=0.03)  # four standard deviations
        expected = count / 3 / (11 - rows) ** 2
        numbers = [number for (size, _, _), number in places.items() if size == rows]
        assert len(numbers) == (11 - rows) ** 2
        assert all(abs(number - expected) < 5 * expected**0.5 for number in numbers)


def test_the_gradient_is_its_own_for_the_same_draws() -> None:
    transform, x = ResizePad(), images(3, 2, 12, 12).double()
    weight = images(3, 2, 12, 12).double()

    def scalar(pixels: Tensor) -> Tensor:
        transform.reseed(4)
        return (transform(pixels) * weight).sum()

    (gradient,) = torch.autograd.grad(scalar(x.requires_grad_()), x)
    # Linear in the image: its value is the gradient times the image.
    torch.testing.assert_close((gradient * x).sum(), scalar(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "wrong", [{"output": 0}, {"output": -1}, {"smallest": 1.2}, {"smallest": 0}, {"eot_samples": 0}]
)
def test_wrong_settings_are_told(wrong: dict[str, float]) -> None:
    (key,) = wrong
    with pytest.raises(UserError, match=rf"resize_pad\.{key}=.*type defense\.wrap\.resize_pad"):
        ResizePad(**wrong)  # type: ignore[arg-type]

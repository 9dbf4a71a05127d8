"""Transforms that do not keep the contract: told in a sentence, whenever it shows."""

import pytest
import torch
from torch import Tensor

from robustbench_local.defenses import Median, Preprocess
from robustbench_local.errors import UserError


class Brighter(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return x + 0.25


class Numberless(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return x / x.amax((2, 3), keepdim=True)  # black images have no brightest pixel


class Endless(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return 1 / x


class Doubled(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return x.double()


class Coloured(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return x.repeat(1, 3, 1, 1)


class Averaged(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True)


class Flat(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return x.flatten(2)


class Nothing(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        x.clamp(0.1, 0.9)  # and no return


class Detached(Preprocess):
    differentiable = True

    def transform(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().round())


class Shifted(Preprocess):
    """A stand-in of one row less."""

    def transform(self, x: Tensor) -> Tensor:
        return x.round()

    def surrogate(self, x: Tensor) -> Tensor:
        return x[:, :, 1:]


class Constant(Shifted):
    def surrogate(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


FAULTS = [
    (Brighter, r"Brighter\.transform returned pixels from 0\.25 to 1\.25 .*expected \[0, 1\]"),
    (Numberless, r"Numberless\.transform returned pixels that are no numbers .*division by zero"),
    (Endless, r"Endless\.transform returned pixels from 1 to inf"),
    (Doubled, r"Doubled\.transform returned float64 on cpu for images of float32 on cpu"),
    (Coloured, r"Coloured\.transform returned shape \(4, 3, 8, 8\).*expected \(4, 1, height, wi"),
    (Averaged, r"Averaged\.transform returned shape \(1, 1, 8, 8\).*expected \(4, 1,"),
    (Flat, r"Flat\.transform returned shape \(4, 1, 64\)"),
    (Nothing, r"Nothing\.transform returned a NoneType; expected a tensor of images"),
]

BACKWARD = [
    (Detached, r"Detached\.transform has no gradient and is said to have one"),
    (Shifted, r"Shifted\.surrogate returned shape \(4, 1, 7, 8\).*expected .*shape \(4, 1, 8, 8\)"),
    (Constant, r"Constant\.surrogate has no gradient"),
]


def batch() -> Tensor:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 0, 0, 0], x[2, 0, 0, 0] = 0, 0, 1
    return x


@pytest.mark.parametrize(("part", "told"), FAULTS)
@pytest.mark.parametrize("tracked", [False, True])
def test_what_is_no_batch_of_images_is_told_whenever_it_comes(
    part: type[Preprocess], told: str, tracked: bool
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        part()(batch().requires_grad_(tracked))
    assert "; expected " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("part", "told"), BACKWARD)
def test_a_gradient_that_is_not_there_is_told(part: type[Preprocess], told: str) -> None:
    part()(batch())
    with pytest.raises(UserError, match=told):
        part()(batch().requires_grad_())


def test_another_size_and_a_rounding_beyond_the_box_are_allowed() -> None:
    class Rounding(Preprocess):
        def transform(self, x: Tensor) -> Tensor:
            return x[:, :, ::2] * (1 + 5e-7)

        def surrogate(self, x: Tensor) -> Tensor:
            return x[:, :, ::2]

    assert float(Rounding()(batch()).max()) > 1
    assert Rounding()(batch()[:0]).shape == (0, 1, 4, 8)


def test_images_that_are_outside_already_are_not_the_transforms_fault() -> None:
    """Some attacks of other libraries look there on their way."""
    x = batch() - 0.5
    assert torch.equal(Median(size=3)(x), Median(size=3)(x + 0.5) - 0.5)


def test_transforms_run_in_full_precision_whatever_the_training() -> None:
    class Linear(Preprocess):
        differentiable = True

        def transform(self, x: Tensor) -> Tensor:
            return (x @ torch.eye(8)).clamp(0, 1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Linear()(batch()), batch())
        assert (batch() @ torch.eye(8)).dtype == torch.bfloat16  # it would not have been

"""Which images are validation and test images: stratified by class and fixed by a seed."""

from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_local.errors import UserError

Purpose: TypeAlias = Literal["validation", "test", "embedded"]

# One independent random stream per purpose, so that the test subset says nothing about the others.
_STREAM: dict[Purpose, int] = {"validation": 1, "test": 2, "embedded": 3}


def split_validation(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split a training set into the images to train on and the validation images.

    Both are sorted positions, int64, and together they are the whole set. Every class keeps at
    least one image on either side; a class with a single image raises `UserError`.
    """
    counts = torch.bincount(labels).numpy()
    lonely = np.flatnonzero(counts == 1)
    if lonely.size:
        raise UserError(
            f"class {lonely[0]} has a single training image and at least 2 were expected, one of "
            "them for validation: add images of that class to the training set or leave it out"
        )
    held = apportion(counts, round(fraction * len(labels)))
    held = np.where(counts > 0, held.clip(1, np.maximum(counts - 1, 1)), 0)
    validation = draw(labels, held, seed, "validation")
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[validation] = False
    return mask.nonzero().flatten(), validation


def choose_test(labels: Tensor, size: int | None, classes: int, seed: int) -> Tensor:
    """Choose the test images to use: all of them, or `size` in proportion to the classes.

    Gives sorted positions, int64. Raises `UserError` for a size that can't be met.
    """
    total = len(labels)
    if size is None or size == total:
        return torch.arange(total)
    if size > total:
        raise UserError(
            f"dataset.test_size={size} is more than the {total} test images there are: type a "
            "number up to that, or dataset.test_size=null for all of them"
        )
    if size < classes:
        raise UserError(
            f"dataset.test_size={size} is too small for {classes} classes, at least one image of "
            f"each was expected: type dataset.test_size={classes} or more"
        )
    return draw_total(labels, size, seed, "test")


def draw_total(labels: Tensor, total: int, seed: int, purpose: Purpose) -> Tensor:
    """Draw `total` positions in proportion to the classes, sorted, int64."""
    return draw(labels, apportion(torch.bincount(labels).numpy(), total), seed, purpose)


def apportion(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Share out `total` places in proportion to `counts` by the largest remainder.

    Integer arithmetic, so that no rounding decides; equal remainders go to the lower class. No
    class gets more than it has as long as `total` is at most the sum of `counts`.
    """
    places, remainders = np.divmod(counts.astype(np.int64) * total, int(counts.sum()))
    order = np.argsort(-remainders, kind="stable")
    places[order[: total - int(places.sum())]] += 1
    return places


def draw(labels: Tensor, per_class: NDArray[np.int64], seed: int, purpose: Purpose) -> Tensor:
    """Draw `per_class[k]` random positions of every class k, sorted, int64."""
    # NumPy and torch promise to keep a bit generator's raw stream, not what `permutation` or
    # `randperm` make of it; a split must outlive an upgrade, so the raw numbers decide the order.
    bits = np.random.PCG64(np.random.SeedSequence([seed, _STREAM[purpose]]))
    keys = bits.random_raw(len(labels))
    y = labels.numpy()
    chosen = []
    for k, count in enumerate(per_class):
        members = np.flatnonzero(y == k)
        chosen.append(members[np.argsort(keys[members], kind="stable")[:count]])
    return torch.from_numpy(np.sort(np.concatenate(chosen)).astype(np.int64))

"""Two attacks on the same images: how many images are they apart, and is it more than chance?

What became of the images is bool (N, draws): each draw of the judge right or wrong. Deterministic
victims have one draw, and every difference counts; else noise is allowed for.
"""

from torch import Tensor

from robustbench_local.evaluation.audit.config import Audit


def broken_besides(base: Tensor, other: Tensor) -> Tensor:
    """How much of each image the other attack breaks in addition, float64 (N,).

    Of a random victim the first half of the draws says which attack was better, and the second half
    by how much: what was merely luck in the one averages out in the other.
    """
    draws = base.shape[1]
    if draws == 1:
        return (base & ~other).squeeze(1).double()
    half = draws // 2
    better = _share(other[:, :half]) < _share(base[:, :half])
    return (_share(base[:, half:]) - _share(other[:, half:])).where(better, 0.0)


def shares_apart(base: Tensor, other: Tensor) -> Tensor:
    """By how much the share of right draws of each image is lower after the other, float64 (N,)."""
    return _share(base) - _share(other)


def is_more_than_chance(apart: Tensor, config: Audit, *, random: bool, points: float = 0) -> bool:
    """Whether the images apart exceed the stray ones, `points` percent of all, and the noise."""
    limit = max(points / 100 * len(apart), float(config.stray_images))
    if random:
        limit += config.deviations * noise(apart)
    return float(apart.sum()) > limit + 1e-9


def noise(apart: Tensor) -> float:
    """One standard error of a sum of paired differences."""
    return float(apart.square().sum().sqrt())


def accuracy(correct: Tensor) -> float:
    """Robust accuracy: the mean over images and draws."""
    return float(_share(correct).mean())


def _share(correct: Tensor) -> Tensor:
    return correct.double().mean(1)

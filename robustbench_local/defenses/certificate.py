"""What can be proved of a classifier under normal noise, from a sample of its votes.

Cohen, Rosenfeld and Kolter 2019, arXiv:1902.02918.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from robustbench_local.gradients import images_at_once, pristine
from robustbench_local.randomness import derive_seed, reseed
from robustbench_local.types import Images, Model

if TYPE_CHECKING:
    from robustbench_local.data import Split

ABSTAIN = -1
"""The prediction where the votes decide nothing."""


class Certificate(NamedTuple):
    """The class of an image, or `ABSTAIN`, and the l2 radius around it without any other class.

    Both hold with probability 1 - alpha, the class for every perturbation shorter than the radius.
    """

    prediction: int
    radius: float


@dataclass(frozen=True, kw_only=True)
class Majority:
    """The smoothed classifier: the class that `noisy` names most often, over all of its noise.

    `noisy` is a model that adds normal noise of standard deviation `sigma`, in pixel units, to
    every pixel of what it is given, and no less: clipped noise would void the certificate here,
    clipping behind it does not. `n0` votes choose a class, `n` others certify or predict, each
    answer being wrong with probability `alpha` at most.
    """

    noisy: Model
    sigma: float
    n0: int
    n: int
    alpha: float

    def predict(self, x: Images) -> Tensor:
        """The class of each image, or `ABSTAIN`, int64 (N,).

        The two most frequent classes of `n` votes are told apart by a two-sided binomial test.
        """
        return torch.tensor([self.winner(self.votes(image, self.n)) for image in x])

    def winner(self, votes: Tensor) -> int:
        """The class that `n` votes, int64 (K,), decide on, or `ABSTAIN`."""
        from scipy.stats import binomtest  # not at the top: it takes a second

        first, second = votes.topk(2).values.tolist()
        decided = binomtest(first, first + second, 0.5).pvalue <= self.alpha
        return int(votes.argmax()) if decided else ABSTAIN

    def certify(self, x: Images) -> list[Certificate]:
        """The certificate of each image: sigma * quantile(least probability of its class)."""
        return [self.certify_and_predict(image)[0] for image in x]

    def certify_and_predict(self, image: Tensor) -> tuple[Certificate, int]:
        """The certificate of an image (C, H, W) and, from the same `n` votes, its prediction.

        Either is wrong with probability alpha at most. A class that leads without a majority can be
        predicted and not certified.
        """
        candidate = int(self.votes(image, self.n0).argmax())
        votes = self.votes(image, self.n)
        predicted = self.winner(votes)
        least = lower_bound(int(votes[candidate]), self.n, self.alpha)
        if least < 0.5:
            return Certificate(ABSTAIN, 0.0), predicted
        return Certificate(candidate, self._radius(least)), predicted

    def votes(self, image: Tensor, n: int) -> Tensor:
        """How many of `n` noisy passes of an image (C, H, W) name each class, int64 (K,)."""
        together = images_at_once(image[None])
        counts: Tensor | int = 0
        with pristine(self.noisy), torch.no_grad():
            for first in range(0, n, together):
                logits = self.noisy(image.expand(min(together, n - first), *image.shape))
                counts = counts + logits.argmax(1).bincount(minlength=logits.shape[1])
        assert isinstance(counts, Tensor)
        return counts.cpu()

    @property
    def largest_radius(self) -> float:
        """What `n` votes certify where they all agree."""
        return self._radius(lower_bound(self.n, self.n, self.alpha))

    def _radius(self, least: float) -> float:
        from scipy.stats import norm

        return float(self.sigma * norm.ppf(least))


def lower_bound(successes: int, n: int, alpha: float) -> float:
    """The one-sided Clopper-Pearson bound: the probability is at least that, at level 1 - alpha."""
    from scipy.stats import beta

    return float(beta.ppf(alpha, successes, n - successes + 1)) if successes else 0.0


def certified_accuracy(
    classifier: Majority,
    split: "Split",
    radii: Sequence[float],
    *,
    images: int | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda done, certified: None,
) -> dict[str, Any]:
    """The share of the images that are right and certified beyond each radius, as JSON holds it.

    Beside it, under `predicted`, the share that the smoothed classifier predicts rightly, of which
    nothing is certified, and how often it abstains.

    `images` of the split, evenly spread, or all of them. Every share has its 95% Clopper-Pearson
    interval over the images. The draws of an image depend on `seed` and its place in the test set.
    `progress` is called with the images done since its last call and the share at the first radius.
    """
    count = len(split) if images is None else min(images, len(split))
    chosen = [place * len(split) // count for place in range(count)]
    held = dict.fromkeys(radii, 0)
    abstained = undecided = predicted_rightly = 0
    for done, place in enumerate(chosen, start=1):
        reseed(classifier.noisy, derive_seed(seed, "certify", int(split.indices[place])))
        image, label = split.pixels(slice(place, place + 1))[0], int(split.labels[place])
        found, predicted = classifier.certify_and_predict(image)
        abstained += found.prediction == ABSTAIN
        undecided += predicted == ABSTAIN
        predicted_rightly += predicted == label
        right = found.prediction == label
        for radius in radii:
            held[radius] += right and found.radius > radius
        progress(1, held[radii[0]] / done)
    return {
        "norm": "l2",
        "radii": {f"{radius:g}": _share(right, count) for radius, right in held.items()},
        "abstained": abstained,
        "predicted": {**_share(predicted_rightly, count), "abstained": undecided},
        "images": count,
        "sigma": classifier.sigma,
        "n0": classifier.n0,
        "n": classifier.n,
        "alpha": classifier.alpha,
        "largest_radius": classifier.largest_radius,
    }


def _share(right: int, count: int) -> dict[str, float]:
    from robustbench_local.results.statistics import clopper_pearson

    share = clopper_pearson(right, count)._asdict()
    assert all(map(math.isfinite, share.values()))
    return {**share, "n": count}

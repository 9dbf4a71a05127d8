"""JPEG in front of a model: one quality, or several in the ways that were published."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from robustbench_local.defenses.drawing import Drawing
from robustbench_local.defenses.jpeg_codec import compress, differentiable
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.settings import require_flag
from robustbench_local.errors import UserError
from robustbench_local.types import Images, Logits, Model

StandIn: TypeAlias = Literal["differentiable", "identity"]
"""What an attacker differentiates instead of the codec: `jpeg_codec.differentiable`, or nothing."""

QUALITIES = (20, 40, 60, 80)
"""Those of SHIELD."""

_KEY = "defense.wrap.NAME"


class Jpeg(Preprocess):
    """JPEG of one `quality`, 1 to 100 (Dziugaite et al. 2016, arXiv:1608.00853, quality 75)."""

    def __init__(
        self,
        *,
        quality: int = 75,
        surrogate: StandIn = "differentiable",
        in_training: bool = False,
        at_run_time: bool = True,
    ) -> None:
        super().__init__(in_training=in_training, at_run_time=at_run_time)
        if not _is_quality(quality):
            raise UserError(
                f"defense.wrap.jpeg.quality={quality}; expected a whole number from 1 to 100: "
                "type defense.wrap.jpeg.quality=75"
            )
        self.quality = quality
        self.stand_in = _checked(surrogate)

    def transform(self, x: Images) -> Images:
        """What the file leaves of the images."""
        return compress(x, _same(self.quality, x))

    def surrogate(self, x: Images) -> Images:
        """The stand-in chosen."""
        return x if self.stand_in == "identity" else differentiable(x, _same(self.quality, x))


class JpegRandom(Drawing):
    """JPEG of a quality drawn anew for every image, each of `qualities` as likely."""

    def __init__(
        self,
        *,
        qualities: Sequence[int] = QUALITIES,
        surrogate: StandIn = "differentiable",
        eot_samples: int = 20,
        in_training: bool = False,
        at_run_time: bool = True,
    ) -> None:
        super().__init__(eot_samples=eot_samples, in_training=in_training, at_run_time=at_run_time)
        self.qualities = _checked_list(qualities)
        self.stand_in = _checked(surrogate)

    def draw(self, x: Images) -> Tensor:
        """Which of the qualities, a row for each image."""
        return self._picks((len(x),), x)

    def transform_of(self, x: Images, drawn: Tensor) -> Images:
        """What the files leave of the images."""
        return compress(x, self._of(drawn))

    def surrogate_of(self, x: Images, drawn: Tensor) -> Images:
        """The stand-in chosen, at the same qualities."""
        return x if self.stand_in == "identity" else differentiable(x, self._of(drawn))

    def _of(self, picks: Tensor) -> Tensor:
        return torch.tensor(self.qualities, device=picks.device)[picks]

    def _picks(self, shape: tuple[int, ...], x: Images) -> Tensor:
        generator = self.generator(x.device)
        return torch.randint(len(self.qualities), shape, generator=generator, device=x.device)


class JpegSlq(JpegRandom):
    """Stochastic local quantisation, SLQ, of SHIELD (Das et al. 2018, arXiv:1802.06816).

    The whole image is compressed at every quality; each block of 8x8 pixels, those cut off by the
    border too, is then taken from one of the decoded images, the same for all channels.

    Deviation: SHIELD trains a network on plain JPEG of each quality and lets them vote on images
    under SLQ; here is one network, with `in_training` trained on images under SLQ.
    """

    def draw(self, x: Images) -> Tensor:
        """Which of the qualities for every block, (N, blocks down, blocks across)."""
        return self._picks((len(x), -(-x.shape[2] // 8), -(-x.shape[3] // 8)), x)


@dataclass(frozen=True, kw_only=True)
class JpegVote:
    """The mean of what the model says at every quality (Das et al. 2017, arXiv:1705.02900).

    Deviations: one model instead of one trained at each quality, and the mean of its probabilities
    instead of the majority of their votes, so that there is a gradient.
    """

    averages: ClassVar[bool] = True

    qualities: Sequence[int] = QUALITIES
    surrogate: StandIn = "differentiable"
    in_training: bool = False
    at_run_time: bool = True

    def __post_init__(self) -> None:
        _checked_list(self.qualities)
        _checked(self.surrogate)
        for name in ("in_training", "at_run_time"):
            require_flag(f"{_KEY}.{name}", getattr(self, name))

    def __call__(self, model: Model) -> "Voting":
        """The model behind all qualities."""
        parts = [Jpeg(quality=each, surrogate=self.surrogate) for each in self.qualities]
        return Voting(model, parts)


class Voting(nn.Module):
    """The logarithm of a model's class probabilities, averaged over transforms of the image.

    Of the probabilities, since logits of different passes have no common scale: one that is very
    sure would decide alone. The logarithm is what softmax turns into that mean again, so losses on
    logits mean the same, and their gradients do not end where probabilities saturate.
    """

    def __init__(self, model: Model, parts: Sequence[Preprocess]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.model = model

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to log-probabilities (N, K)."""
        votes = torch.stack([self.model(part(x)).log_softmax(1) for part in self.parts])
        mean: Logits = votes.logsumexp(0) - math.log(len(votes))
        return mean


def _same(quality: int, x: Images) -> Tensor:
    return torch.full((len(x),), quality, device=x.device)


def _is_quality(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 100


def _checked_list(qualities: Sequence[int]) -> tuple[int, ...]:
    if isinstance(qualities, Sequence) and qualities and all(map(_is_quality, qualities)):
        return tuple(qualities)
    raise UserError(
        f"{_KEY}.qualities={qualities}; expected one or more whole numbers from 1 to 100: type "
        f"{_KEY}.qualities=[20,40,60,80]"
    )


def _checked(surrogate: StandIn) -> StandIn:
    if surrogate in ("differentiable", "identity"):
        return surrogate
    raise UserError(
        f"{_KEY}.surrogate={surrogate}; expected differentiable or identity: type "
        f"{_KEY}.surrogate=differentiable"
    )

"""What all detectors share: a score, a threshold from validation data, and rejection above it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from robustbench_local.defenses.settings import read_number
from robustbench_local.errors import UserError
from robustbench_local.gradients import images_at_once, pristine
from robustbench_local.randomness import derive_seed, reseed
from robustbench_local.types import Images, Logits, Model

if TYPE_CHECKING:
    from robustbench_local.training.workshop import Workshop


class Scorer(nn.Module, ABC):
    """How suspicious images are, in log-odds or another unit of the size of logits.

    Its gradient is what an adaptive attack follows.
    """

    @abstractmethod
    def forward(self, model: Model, x: Images, logits: Logits) -> Tensor:
        """The higher the more suspicious, shape (N,); `logits` is what `model` says about `x`."""


@dataclass(frozen=True)
class Calibration:
    """A threshold and the validation images it was set on; `validation_rejected` is a share."""

    threshold: float
    false_positive_rate: float
    validation_images: int
    validation_rejected: float


class Detecting(nn.Module):
    """A model that rejects images whose score is above the threshold: logits (N, K + 1).

    The last logit is the largest exactly where the image is rejected: the largest of the classes
    plus score minus threshold. So the detector is differentiable end to end, as far as its score
    is. Raises `UserError` where there is no threshold yet.
    """

    abstains = True

    def __init__(self, model: Model, scorer: Scorer, calibration: Calibration | None) -> None:
        super().__init__()
        self.model = model
        self.scorer = scorer
        self.calibration = calibration

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K + 1)."""
        if self.calibration is None:
            raise UserError("the detector has no threshold yet; call Defense.fit(workshop)")
        logits: Logits = self.model(x)
        score: Tensor = self.scorer(self.model, x, logits)
        excess = score - self.calibration.threshold
        highest = logits.amax(1)
        rejection = highest + excess
        # Where the excess is lost in rounding, a tie would be read as the class.
        above = torch.nextafter(highest, torch.full_like(highest, torch.inf))
        lift = (above - rejection).clamp(min=0).where(excess > 0, 0).detach()
        return torch.cat((logits, (rejection + lift)[:, None]), 1)


@dataclass(frozen=True, kw_only=True)
class Detector(ABC):
    """A wrap that rejects images with a high score. Subclasses make the `scorer`, and are `called`.

    The threshold is set on the clean validation images, as they come through the whole defense, so
    that at most the share `false_positive_rate` of them is rejected; midway between two scores, so
    that rounding does not decide.
    """

    abstains: ClassVar[bool] = True
    called: ClassVar[str]
    """Its name in the configuration."""

    false_positive_rate: float = 0.05
    calibration: Calibration | None = field(default=None, repr=False, compare=False)
    learned: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """After `fit`, where a network is trained, what a record says of it, see `learned_by`."""

    def __post_init__(self) -> None:
        rate = read_number(
            f"defense.wrap.{self.called}.false_positive_rate",
            self.false_positive_rate,
            fits=lambda number: 0 <= number < 1,
            expected="a share of the clean images, from 0 to below 1",
            example=0.05,
        )
        object.__setattr__(self, "false_positive_rate", rate)

    @abstractmethod
    def scorer(self) -> Scorer:
        """A new scorer, which shares no random draws with others."""

    def __call__(self, model: Model) -> Model:
        """See `Detecting`."""
        return Detecting(model, self.scorer(), self.calibration)

    def fit(self, workshop: "Workshop") -> Self:
        """Train what the score needs; here nothing. Raises `UserError` without validation data."""
        if len(workshop.data.validation) == 0:
            raise UserError(
                f"{workshop.data.name} has no validation images and a detector sets its threshold "
                "on them; type dataset.validation_fraction=0.05"
            )
        return self

    def calibrate(self, victim: Model, workshop: "Workshop") -> Self:
        """The same with the threshold that suits `victim`, made with this detector inside."""
        # Imported here: evaluation imports attacks, which training needs first.
        from robustbench_local.evaluation.judge import exact

        (detecting,) = (part for part in victim.modules() if isinstance(part, Detecting))
        detecting.calibration = Calibration(0, self.false_positive_rate, 0, 0)
        scores: list[Tensor] = []
        hook = detecting.scorer.register_forward_hook(
            lambda module, inputs, score: scores.append(score.detach().double().cpu())
        )
        images = workshop.data.validation
        seed = derive_seed(workshop.seed, "threshold")
        with exact(), pristine(victim, seed=seed), torch.no_grad():
            reseed(victim, seed)
            at_once = images_at_once(images.pixels(slice(0, 1)))
            for start in range(0, len(images), at_once):
                victim(images.pixels(slice(start, start + at_once)))
        hook.remove()
        if sum(map(len, scores)) != len(images):
            raise UserError(
                f"a {type(self).__name__} is asked {sum(map(len, scores))} times about "
                f"{len(images)} images by what stands in front of it; expected once for each: name "
                "the detector first, as in defense=[DETECTOR,OTHER]"
            )
        return replace(self, calibration=settle(torch.cat(scores), self.false_positive_rate))


def settle(scores: Tensor, rate: float) -> Calibration:
    """The least threshold that at most the share `rate` of the scores (N,) exceeds.

    Midway between the last score that is accepted and the first that is not, where there are both.
    """
    count = len(scores)
    ordered = scores.sort().values
    allowed = int(rate * count + 1e-9)
    last = ordered[count - 1 - allowed]
    beyond = ordered[ordered > last]
    threshold = float((last + beyond[0]) / 2 if len(beyond) else last)
    return Calibration(threshold, rate, count, float((scores > threshold).double().mean()))


def describe_detection(victim: Model) -> Mapping[str, Any] | None:
    """What a victim's threshold was set on, as JSON holds it; None without a detector of ours."""
    settled = [part.calibration for part in victim.modules() if isinstance(part, Detecting)]
    return asdict(settled[0]) if settled and settled[0] is not None else None

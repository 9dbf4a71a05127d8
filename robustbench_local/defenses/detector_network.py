"""A network that tells attacked images from clean ones."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from robustbench_local.attacks import Attack
from robustbench_local.data import Dataset, Split
from robustbench_local.defenses.detection import Detector, Scorer
from robustbench_local.defenses.recipe import Criterion, Recipe
from robustbench_local.errors import UserError
from robustbench_local.identity import class_version
from robustbench_local.models import Normalized, SmallCNN, pixel_statistics
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels, Logits, Model

if TYPE_CHECKING:
    from robustbench_local.training.workshop import Workshop

VALIDATION = 1000
"""Validation images, at most, that are attacked to select an epoch; evenly spread."""

_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class DetectorNetwork(Detector):
    """A binary classifier, clean or attacked (Gong, Wang and Ku 2017, arXiv:1704.04960).

    The score is the difference of its two logits. It is a `SmallCNN` of `width` and `hidden` units,
    trained like the classifier, for `epochs` (null: as many), on every training image and on what
    `attack` makes of it within `threat`: the budget of training, not that of the evaluation.

    Deviations: images are attacked anew in each step (as in Metzen et al. 2017, arXiv:1702.04267),
    away from the class predicted, and rounded to 256 levels, lest the network learns that only
    stored images have whole levels.
    """

    attack: Attack
    threat: ThreatModel
    epochs: int | None = None
    width: int = 16
    hidden: int = 64
    network: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "width", "hidden"):
            if name != "epochs" or self.epochs is not None:
                require_count(f"defense.wrap.detector.{name}", getattr(self, name))
        self.attack.require(self.threat)

    def fit(self, workshop: "Workshop") -> Self:
        """Train the detector against `workshop.network`, or take it from the cache."""
        super().fit(workshop)
        classifier = workshop.network
        assert classifier is not None  # wraps come after it
        self.attack.check(workshop.data, self.threat)
        recipe = TellApart(victim=classifier.model, attack=self.attack, threat=self.threat)
        trained = replace(workshop, data=recipe.data(workshop.data)).train(
            lambda: binary_network(workshop.data, self.width, self.hidden),
            recipe,
            key={
                **workshop.model,  # the precision too
                "model": {
                    "_target_": "robustbench_local.models.SmallCNN",
                    "width": self.width,
                    "hidden": self.hidden,
                    "code": class_version(SmallCNN),
                },
                "protects": classifier.sha256,
            },
            schedule=replace(workshop.schedule, epochs=self.epochs or workshop.schedule.epochs),
        )
        return replace(self, network=trained.model.requires_grad_(False))

    def scorer(self) -> Scorer:
        """See the class."""
        if self.network is None:
            raise UserError("the detector is not trained yet; call Defense.fit(workshop)")
        return LogitDifference(self.network)


class LogitDifference(Scorer):
    """How much more attacked than clean the images look to a binary network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, model: Model, x: Images, logits: Logits) -> Tensor:
        """See `Scorer`."""
        said: Tensor = self.network(x)
        return said[:, 1] - said[:, 0]


def binary_network(data: Dataset, width: int, hidden: int) -> Normalized:
    """A freshly initialised network for images of `data` and two classes, on the CPU."""
    shape = data.input_shape
    network = SmallCNN(input_shape=shape, num_classes=2, width=width, hidden=hidden)
    return Normalized(network, *pixel_statistics(data.train.images), channels=shape[0])


@dataclass(frozen=True, kw_only=True)
class TellApart(Recipe):
    """Training on images of label 0 as they are, and on those of label 1 attacked.

    The attack works on `victim`, whose weights enter the key of the training elsewhere.
    """

    adversarial: ClassVar[bool] = True

    attack: Attack
    threat: ThreatModel
    victim: nn.Module = field(repr=False, compare=False)

    def data(self, data: Dataset) -> Dataset:
        """Each training image once with either label; validation images attacked already."""
        train, few = data.train, min(VALIDATION, len(data.validation))
        rows = torch.arange(few, device=train.labels.device) * len(data.validation) // few
        clean = data.validation.images[rows]
        broken = self.attacked(data.validation.pixels(rows), seed=0)
        broken = (broken * 255).round().to(torch.uint8)
        return replace(
            data,
            train=_halves(train.images, train.images, train.indices),
            validation=_halves(clean, broken, data.validation.indices[rows.cpu()]),
            class_names=("clean", "attacked"),
        )

    def attacked(self, x: Images, *, seed: int) -> Images:
        """The images attacked, rounded to multiples of 1/255."""
        attack = replace(self.attack, seed=derive_seed(seed, "detector"))
        found = []
        for start in range(0, len(x), _BATCH):
            part = x[start : start + _BATCH]
            with torch.no_grad():
                y = self.victim(part).argmax(1)
            found.append((attack(self.victim, part, y, self.threat) * 255).round())
        return torch.cat(found) / torch.full((), 255.0, device=x.device)  # as `Split.pixels`

    def loss(
        self,
        model: Model,
        x: Images,
        y: Labels,
        *,
        criterion: Criterion,
        progress: float,
        step: int,
        seed: int,
    ) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`."""
        chosen = y == 1
        if chosen.any():
            x = x.clone()
            x[chosen] = self.attacked(x[chosen], seed=derive_seed(seed, step))
        logits: Logits = model(x)
        return criterion(logits, y), logits


def require_count(key: str, value: object) -> None:
    """Raise `UserError` unless a setting is a whole number from 1; `key` is its whole name."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}={value}; expected a whole number, 1 or more: type {key}=16")


def _halves(clean: Tensor, attacked: Tensor, indices: Tensor) -> Split:
    labels = torch.arange(2, device=clean.device).repeat_interleave(len(clean))
    return Split(torch.cat((clean, attacked)), labels, torch.cat((indices, indices)))

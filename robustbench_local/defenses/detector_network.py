"""A network that tells attacked images from clean ones."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from robustbench_local.attacks import Attack
from robustbench_local.data import Dataset, Split
from robustbench_local.defenses.detection import Detector, Scorer
from robustbench_local.defenses.learned import learned_by
from robustbench_local.defenses.recipe import Recipe
from robustbench_local.defenses.settings import require_attack, require_budget, require_count
from robustbench_local.errors import UserError
from robustbench_local.identity import class_version
from robustbench_local.models import Normalized, pixel_statistics
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Step
from robustbench_local.types import Images, Logits, Model

if TYPE_CHECKING:
    from robustbench_local.training.workshop import Workshop

VALIDATION = 1000
"""Validation images, at most, that are attacked to select an epoch; evenly spread."""

_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class DetectorNetwork(Detector):
    """A binary classifier, clean or attacked (Gong, Wang and Ku 2017, arXiv:1704.04960).

    The score is the difference of its two logits. It is a `Watcher` of `width` channels, trained
    like the classifier, for `epochs` (null: as many), on every training image and on what `attack`
    makes of it within `threat`: the budget of training, not that of the evaluation.

    Of several epochs the best is selected on validation images, on which the threshold is set too:
    the share of test images that is rejected may then be a little above `validation_rejected`.

    Deviations: images are attacked anew in each step (as in Metzen et al. 2017, arXiv:1702.04267),
    away from the class predicted, and rounded to 256 levels, lest the network learns that only
    stored images have whole levels.
    """

    called: ClassVar[str] = "detector"

    attack: Attack
    threat: ThreatModel
    epochs: int | None = None
    width: int = 16
    network: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("defense.wrap.detector.width", self.width, example=16)
        if self.epochs is not None:
            require_count("defense.wrap.detector.epochs", self.epochs, example=5)
        require_attack("defense.wrap.detector.attack", self.attack)
        require_budget("defense.wrap.detector.threat", self.threat)
        self.attack.require(self.threat)

    def fit(self, workshop: "Workshop") -> Self:
        """Train the detector against `workshop.network`, or take it from the cache."""
        super().fit(workshop)
        classifier = workshop.network
        assert classifier is not None  # wraps come after it
        self.attack.check(workshop.data, self.threat)
        recipe = TellApart(victim=classifier.model, attack=self.attack, threat=self.threat)
        trained = replace(workshop, data=recipe.data(workshop.data)).train(
            lambda: watcher(workshop.data, self.width),
            recipe,
            key={
                **workshop.model,  # the precision too
                "model": {
                    "_target_": "robustbench_local.defenses.detector_network.Watcher",
                    "width": self.width,
                    "code": class_version(Watcher),
                },
                "protects": classifier.sha256,
            },
            schedule=replace(workshop.schedule, epochs=self.epochs or workshop.schedule.epochs),
        )
        network = trained.model.requires_grad_(False)
        return replace(self, network=network, learned=learned_by(trained))

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


class Watcher(nn.Module):
    """Three convolutions and the mean over the image: two logits, for images of any size.

    What betrays an attack may be anywhere. `width` channels, then twice and four times as many.
    """

    channels_last: ClassVar[bool] = True

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(input_shape[0], width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Images) -> Logits:
        """Normalised images (N, C, H, W) to logits (N, K)."""
        logits: Logits = self.head(self.layers(x).mean((2, 3)))
        return logits


def watcher(data: Dataset, width: int) -> Normalized:
    """A freshly initialised one that takes pixels of `data`, on the CPU."""
    shape = data.input_shape
    network = Watcher(input_shape=shape, num_classes=2, width=width)
    return Normalized(network, *pixel_statistics(data.train.images), channels=shape[0])


@dataclass(frozen=True, kw_only=True)
class TellApart(Recipe):
    """Training on images of label 0 as they are, and on those of label 1 attacked.

    The attack works on `victim`, whose weights enter the key of the training elsewhere.
    """

    adversarial: ClassVar[bool] = True
    draws_by_image: ClassVar[bool] = True

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

    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`."""
        x, chosen = step.x, step.y == 1
        if chosen.any():
            x = x.clone()
            x[chosen] = self.attacked(x[chosen], seed=derive_seed(step.seed, step.number))
        logits: Logits = model(x)
        return step.criterion(logits, step.y), logits


def _halves(clean: Tensor, attacked: Tensor, indices: Tensor) -> Split:
    labels = torch.arange(2, device=clean.device).repeat_interleave(len(clean))
    return Split(torch.cat((clean, attacked)), labels, torch.cat((indices, indices)))

"""Detectors of the Adversarial Robustness Toolbox (ART) by their name there."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_local.attacks import Attack
from robustbench_local.attacks.sandbox import sandbox
from robustbench_local.defenses.detection import Detector, Scorer
from robustbench_local.defenses.detector_network import (
    LogitDifference,
    TellApart,
    Watcher,
    watcher,
)
from robustbench_local.defenses.settings import (
    read_number,
    require_attack,
    require_budget,
    require_count,
)
from robustbench_local.errors import UserError
from robustbench_local.gradients import deterministic, pristine
from robustbench_local.identity import class_version, content_id
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.training.identity import describe
from robustbench_local.training.loop import seeded
from robustbench_local.training.store import Shelf
from robustbench_local.types import Images, Logits, Model

if TYPE_CHECKING:
    from robustbench_local.data import Dataset
    from robustbench_local.training.workshop import Workshop

NAMES = ("BinaryInputDetector", "BinaryActivationDetector")

REFUSED: Mapping[str, str] = {
    "BeyondDetectorPyTorch": "it needs a second, self-supervised network that no configuration can "
    "name, and looks at it without gradients, so that no attack could know of it",
    "EvasionDetector": "it is the base of the others",
    "SubsetScanningDetector": "its score counts ranks among activations, in NumPy: it has no "
    "gradient and no stand-in for one, so that no attack could know of it",
}


@dataclass(frozen=True, kw_only=True)
class ArtDetector(Detector):
    """A detector of ART (Nicolae et al. 2018, arXiv:1807.01069), trained by ART.

    - `name`: `BinaryInputDetector`, a network that looks at the images, a `Watcher` of `width`
      channels; or `BinaryActivationDetector`, one of `hidden` units that looks at the logits of the
      classifier: ART finds no layer further inside of a network that normalises first.
    - It is trained for `epochs` with Adam at `learning_rate`, in batches of `batch_size`, on
      `images` training images, evenly spread, and on what `attack` makes of them within `threat`,
      rounded to 256 levels: the budget of training, not that of the evaluation.

    The score is the difference of the two outputs, computed by ART's network itself, so that it has
    a gradient; ART's own `detect` has none, and rejects where the difference is above 0. Raises
    `UserError` for other names, with the reason where there is such a detector.
    """

    called: ClassVar[str] = "art_detector"
    foreign: ClassVar[bool] = True

    attack: Attack
    threat: ThreatModel
    name: str = "BinaryInputDetector"
    images: int = 5000
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 0.001
    width: int = 16
    hidden: int = 64
    network: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        key = f"defense.wrap.{self.called}"
        if str(self.name) in REFUSED:
            raise UserError(
                f"{key}.name={self.name} is refused: {REFUSED[self.name]}; type "
                f"{key}.name={NAMES[0]}"
            )
        if self.name not in NAMES:
            raise UserError(
                f"{key}.name={self.name} is not a detector of ART; expected one of "
                f"{', '.join(NAMES)}: type {key}.name={NAMES[0]}"
            )
        for name in ("images", "epochs", "batch_size", "width", "hidden"):
            require_count(f"{key}.{name}", getattr(self, name), example=getattr(ArtDetector, name))
        rate = read_number(
            f"{key}.learning_rate",
            self.learning_rate,
            fits=lambda number: number > 0,
            expected="a number above 0",
            example=0.001,
        )
        object.__setattr__(self, "learning_rate", rate)
        require_attack(f"{key}.attack", self.attack)
        require_budget(f"{key}.threat", self.threat)
        self.attack.require(self.threat)

    def fit(self, workshop: "Workshop") -> Self:
        """Have ART train the detector against `workshop.network`, or take it from the cache."""
        super().fit(workshop)
        classifier = workshop.network
        assert classifier is not None  # wraps come after it
        self.attack.check(workshop.data, self.threat)
        settings = {part.name: getattr(self, part.name) for part in fields(self) if part.compare}
        settings.pop("false_positive_rate")
        shelf = Shelf(
            workshop.cache / "art",  # beside our own: `attack.sources` could not build these
            content_id(
                {
                    "art_detector": describe(settings),
                    "network": classifier.sha256,
                    "dataset": workshop.data.fingerprint,
                    "seed": workshop.seed,
                    "code": [class_version(part) for part in (ArtDetector, Watcher)],
                    "library": version("adversarial-robustness-toolbox"),
                }
            ),
        )
        about = shelf.find()
        if about is None:
            with shelf.lock(workshop.console):
                about = shelf.find(repair=True)
                if about is None:
                    weights, seconds = self._train(workshop, classifier.model)
                    facts = {"device": workshop.device.type, "seconds": seconds}
                    about = shelf.write(weights, facts)
        with seeded(0, workshop.device):  # the initial weights are drawn, and then replaced
            network = self._build(workshop.data).to(workshop.device)
        network.load_state_dict(shelf.read())
        learned = {key: about[key] for key in ("key", "sha256", "seconds")}
        learned |= {"validation": {}, "warnings": list(shelf.notes)}  # ART looks at none
        return replace(self, network=network.eval().requires_grad_(False), learned=learned)

    def scorer(self) -> Scorer:
        """See the class."""
        if self.network is None:
            raise UserError("the detector is not trained yet; call Defense.fit(workshop)")
        if self.name == "BinaryActivationDetector":
            return OfTheLogits(self.network)
        return LogitDifference(self.network)

    def _build(self, data: "Dataset") -> nn.Module:
        if self.name == "BinaryInputDetector":
            return watcher(data, self.width)
        first = nn.Linear(data.num_classes, self.hidden)
        return nn.Sequential(first, nn.ReLU(), nn.Linear(self.hidden, 2))

    def _train(self, workshop: "Workshop", victim: Model) -> tuple[dict[str, Tensor], float]:
        """The weights that ART ends with, on the CPU, and the seconds that took."""
        began, device = time.perf_counter(), workshop.device
        train = workshop.data.train
        few = min(self.images, len(train))
        rows = torch.arange(few, device=train.labels.device) * len(train) // few
        recipe = TellApart(victim=victim, attack=self.attack, threat=self.threat)
        clean = train.pixels(rows)
        x = torch.cat((clean, recipe.attacked(clean, seed=workshop.seed))).cpu().numpy()
        y = np.eye(2, dtype=np.float32).repeat(few, axis=0)
        seed = derive_seed(workshop.seed, "art detector")
        with pristine(victim), sandbox(seed, device), deterministic():
            network = self._build(workshop.data)
            detector = art_detector(
                self.name, network, victim, workshop.data, device, learning_rate=self.learning_rate
            )
            detector.fit(x, y, batch_size=self.batch_size, nb_epochs=self.epochs)
        weights = {
            name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
        }
        return weights, time.perf_counter() - began


class OfTheLogits(LogitDifference):
    """How much more attacked than clean the logits look to a binary network."""

    def forward(self, model: Model, x: Images, logits: Logits) -> Tensor:
        """See `Scorer`."""
        return super().forward(model, logits, logits)


def art_detector(
    name: str,
    network: nn.Module,
    victim: Model,
    data: "Dataset",
    device: torch.device,
    *,
    learning_rate: float,
) -> Any:
    """ART's own object around the binary `network`; to be called inside a `sandbox`."""
    import art.defences.detector.evasion as detectors
    from art.estimators.classification import PyTorchClassifier

    def estimator(model: nn.Module, shape: tuple[int, ...], classes: int) -> Any:
        return PyTorchClassifier(
            model=model,
            loss=nn.CrossEntropyLoss(),
            optimizer=torch.optim.Adam(model.parameters(), lr=learning_rate),
            input_shape=shape,
            nb_classes=classes,
            device_type="gpu" if device.type == "cuda" else "cpu",
        )

    kind = getattr(detectors, name)
    if name == "BinaryInputDetector":
        return kind(estimator(network, data.input_shape, 2))
    # A copy: ART leaves its hooks behind.
    watched = estimator(copy.deepcopy(_Whole(victim)), data.input_shape, data.num_classes)
    return kind(watched, estimator(network, (data.num_classes,), 2), layer=0)


class _Whole(nn.Module):
    """A model as the only layer of another one: ART then sees its logits as activations."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Images) -> Logits:
        logits: Logits = self.model(x)
        return logits

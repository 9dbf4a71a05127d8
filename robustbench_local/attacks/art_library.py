"""Every evasion attack of the Adversarial Robustness Toolbox (ART) by its name there."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from robustbench_local.attacks.known import Known
from robustbench_local.attacks.library import LibraryAttack
from robustbench_local.attacks.sandbox import importing_art
from robustbench_local.attacks.victim import Victim
from robustbench_local.gradients import pristine, resists
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels, Norm

if TYPE_CHECKING:
    from robustbench_local.data import Split
    from robustbench_local.oracle import Oracle

_INF = float("inf")
_LINF: Mapping[Norm, Any] = {"linf": _INF}
_L2: Mapping[Norm, Any] = {"l2": 2}
# Under l1 a step there goes to one pixel, also where the box holds it, and the projections leave
# budget unused: a fifth to half of what can be broken is missed.
_BALLS: Mapping[Norm, Any] = {"linf": _INF, "l2": 2}
_STEPS = Known(norms=_BALLS, step="eps_step")
_FEW = "its default of 10 iterations is far below the paper's 1,000 to 10,000"

KNOWN: Mapping[str, Known] = {
    "AutoConjugateGradient": _STEPS,
    "AutoProjectedGradientDescent": _STEPS,
    "BasicIterativeMethod": Known(norms=_LINF, step="eps_step"),
    "BoundaryAttack": Known(norms=_L2, needs="labels", radius=None, one_by_one=True),
    "BrendelBethgeAttack": Known(
        norms={**_BALLS, "l1": 1, "l0": 0}, radius=None, one_by_one=True, package="numba"
    ),
    "CarliniL2Method": Known(norms=_L2, radius=None, must_give={"max_iter": _FEW}),
    "CarliniLInfMethod": Known(norms=_LINF, radius=None, must_give={"max_iter": _FEW}),
    "DeepFool": Known(norms=_L2, radius=None, target="no"),
    "ElasticNet": Known(norms={"l1": None, "l2": None}, radius=None),
    "FastGradientMethod": Known(norms=_BALLS, step="eps_step"),
    "HopSkipJump": Known(norms=_BALLS, needs="labels", radius=None, one_by_one=True),
    "MomentumIterativeMethod": _STEPS,
    # Its steps are measured in probabilities.
    "NewtonFool": Known(norms=_L2, radius=None, target="no", form="probabilities"),
    "PixelAttack": Known(norms={"l0": None}, needs="scores", radius="th", one_by_one=True),
    "ProjectedGradientDescent": _STEPS,
    "ProjectedGradientDescentNumpy": _STEPS,
    "ProjectedGradientDescentPyTorch": _STEPS,
    "RescalingAutoConjugateGradient": _STEPS,
    # The labels it is given are its targets; without any it draws some.
    "SaliencyMapMethod": Known(norms={"l0": None}, radius=None, target="only"),
    "SignOPTAttack": Known(
        norms=_L2, needs="labels", radius=None, target="no", one_by_one=True, classes=3
    ),
    "SimBA": Known(
        norms=_L2,
        needs="scores",
        radius=None,
        fixed={"batch_size": 1},
        one_by_one=True,
        form="probabilities",
    ),
    # Under l2 it divides by the norm of its windows where the paper multiplies, l1 it ignores.
    "SquareAttack": Known(norms=_LINF, needs="scores", paper={"max_iter": 5000}, target="no"),
    "TargetedUniversalPerturbation": Known(norms=_BALLS, target="only"),
    "UniversalPerturbation": Known(norms=_BALLS, target="no"),
    "VirtualAdversarialMethod": Known(
        norms=_L2,
        needs="scores",
        must_give={"finite_diff": "1e-6 drowns in the rounding of float32; 0.01 does not"},
        target="no",
        form="probabilities",
    ),
    "ZooAttack": Known(
        norms=_L2, needs="scores", radius=None, one_by_one=True, must_give={"max_iter": _FEW}
    ),
}

_DETECTOR = "it attacks object detectors and trackers, not classifiers"
_SPEECH = "it attacks speech recognisers, not image classifiers"
_PATCH = "it pastes a patch, which no threat model here allows"
_TENSORFLOW = "it needs a TensorFlow model"
_GUIDE = "it pulls the features of a layer towards those of guide images, not towards an error"

REFUSED: Mapping[str, str] = {
    "AdversarialPatch": _PATCH,
    "AdversarialPatchNumpy": _PATCH,
    "AdversarialPatchPyTorch": _PATCH,
    "AdversarialPatchTensorFlowV2": _PATCH,
    "AdversarialTexturePyTorch": _DETECTOR,
    "AutoAttack": "it is a mix of ART's own and not AutoAttack; type attack=autoattack (the "
    "authors' code) or attack=standard",
    "CarliniL0Method": "it changes most pixels of an image where a few would do; type "
    "attack=few_pixel",
    "CarliniWagnerASR": _SPEECH,
    "CompositeAdversarialAttackPyTorch": "it shifts hue, saturation and brightness, outside every "
    "threat model here; type attack=spatial for its rotations",
    "DPatch": _DETECTOR,
    "DecisionTreeAttack": "it attacks decision trees of scikit-learn",
    "FeatureAdversariesNumpy": _GUIDE,
    "FeatureAdversariesPyTorch": _GUIDE,
    "FeatureAdversariesTensorFlowV2": _TENSORFLOW,
    "FrameSaliencyAttack": "it attacks video, frame by frame",
    "GRAPHITEBlackbox": "it places a printed pattern under a mask, which no threat model here "
    "allows",
    "GRAPHITEWhiteboxPyTorch": "it places a printed pattern under a mask, which no threat model "
    "here allows",
    "GeoDA": "it calls numpy.mat, which NumPy 2 no longer has, and writes files into the working "
    "directory; type attack=hop_skip_jump",
    "HighConfidenceLowUncertainty": "it attacks Gaussian processes of GPy",
    "ImperceptibleASR": _SPEECH,
    "ImperceptibleASRPyTorch": _SPEECH,
    "LaserAttack": "it paints a beam of light over the image, which no threat model here allows",
    "LowProFool": "it attacks tables with features of unequal importance, not images",
    "MalwareGDTensorFlow": _TENSORFLOW,
    "OverTheAirFlickeringPyTorch": "it attacks video",
    "OverloadPyTorch": _DETECTOR,
    "ProjectedGradientDescentTensorFlowV2": _TENSORFLOW,
    "RobustDPatch": _DETECTOR,
    "SNAL": _DETECTOR,
    "ShadowAttack": "its budget is smoothness and colour, which no threat model here knows",
    "SpatialTransformation": "it takes one transform for the whole batch, and interpolates so "
    "that the judge does not know it again; type attack=spatial",
    "ThresholdAttack": "it cuts pixels off to whole numbers of 255 and so leaves the budget; type "
    "attack=square",
    "Wasserstein": "its ball is one of Wasserstein distances, which no threat model here knows",
}

_FROM_A_START = frozenset({"BoundaryAttack", "HopSkipJump"})
_STARTS = 200
"""How many images `fit` asks about."""


@dataclass(frozen=True, kw_only=True)
class ART(LibraryAttack):
    """An attack of ART (Nicolae et al. 2018, arXiv:1807.01069) by `name`, see `LibraryAttack`.

    HopSkipJump is arXiv:1904.02144, BoundaryAttack arXiv:1712.04248. Corrected: float64 images
    under NumPy 2, labels it would predict itself, BoundaryAttack and SignOPTAttack targeted by
    default, unseeded generators, the untouched pixels of PixelAttack. What cannot be put right is
    refused with the reason.

    HopSkipJump and BoundaryAttack begin at the boundary on the way to the first random image that
    is misclassified, as here: most networks have one class for all noise, so where `init_size`
    tries fail, and for targets, the nearest of the images that `fit` asked about takes its place.
    """

    library: ClassVar[str] = "ART"
    package: ClassVar[str] = "adversarial-robustness-toolbox"
    known: ClassVar[Mapping[str, Known]] = KNOWN
    refused: ClassVar[Mapping[str, str]] = REFUSED

    name: str = "ProjectedGradientDescentPyTorch"
    starts: tuple[Images, Labels] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the library's attack by name, without the model."""
        found = inspect.signature(getattr(_evasion(), self.name).__init__).parameters
        return {k: v for k, v in found.items() if k not in ("self", "classifier", "estimator")}

    def fit(self, oracle: "Oracle", data: "Split", threat: ThreatModel) -> Self:
        """Ask for the labels of a few images, which decision-based attacks may start from."""
        if self.name not in _FROM_A_START or len(data) == 0:
            return self
        images = data.pixels(slice(0, _STARTS))
        with pristine(oracle, seed=self.seed), torch.no_grad():
            labels = oracle(images).argmax(1)
        prepared = replace(self)
        object.__setattr__(prepared, "starts", (images, labels))
        return prepared

    def call(
        self,
        victim: Victim,
        x: Images,
        y: Labels,
        wanted: Labels | None,
        arguments: dict[str, Any],
    ) -> Any:
        """Run the library's attack; `y` are the true labels, `wanted` the targets if any."""
        evasion = _evasion()
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            model=victim,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=victim.classes,
            clip_values=(0.0, 1.0),
            channels_first=True,
            device_type="gpu" if x.is_cuda else "cpu",
        )
        if "attacker_params" in self.parameters():
            # Inside it builds another attack, which would print, and not aim at the target.
            chosen = arguments.get("attacker", self.parameters()["attacker"].default)
            inner = {"targeted": True} if wanted is not None else {}
            inner |= {} if chosen == "fgsm" else {"verbose": False}
            arguments["attacker_params"] = inner | (arguments.get("attacker_params") or {})
        attack = getattr(evasion, self.name)(classifier, **arguments)
        labels = np.eye(victim.classes, dtype=np.float32)[
            (y if wanted is None else wanted).cpu().numpy()
        ]
        pixels = x.cpu().numpy().copy()
        if self.name not in _FROM_A_START:
            return attack.generate(x=pixels, y=labels)
        start = self._start(victim, x, y, wanted, attack.init_size)
        if start is None:
            return pixels
        return attack.generate(x=pixels, y=labels, x_adv_init=start.cpu().numpy())

    def _start(
        self, victim: Victim, x: Images, y: Labels, wanted: Labels | None, tries: int
    ) -> Images | None:
        """An image near the boundary that reaches the goal, or None; `x` is a single one."""

        def reaches(candidate: Images) -> bool:
            with torch.no_grad():
                return bool(~resists(victim(candidate), goal, targeted=wanted is not None))

        goal = y if wanted is None else wanted
        end = None
        for _ in range(tries if wanted is None or self.starts is None else 0):
            noise = torch.from_numpy(np.random.uniform(size=x.shape)).to(x)
            if reaches(noise):
                end = noise
                break
        if end is None and self.starts is not None:
            images, labels = self.starts
            fitting = images[(labels != goal) if wanted is None else (labels == goal)]
            for place in (fitting - x).flatten(1).norm(dim=1).argsort()[:1].tolist():
                end = fitting[place : place + 1] if reaches(fitting[place : place + 1]) else None
        if end is None:
            return None
        low, high = 0.0, 1.0  # shares of the way from the image
        for _ in range(10):
            middle = (low + high) / 2
            if reaches(x + middle * (end - x)):
                high = middle
            else:
                low = middle
        return x + high * (end - x)


def _evasion() -> Any:
    with importing_art():
        import art.attacks.evasion as evasion
    return evasion

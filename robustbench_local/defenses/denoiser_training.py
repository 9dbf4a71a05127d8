"""How the denoiser learns: perturbed images in, the clean ones and what a network says of them out.

Defense against adversarial attacks using high-level representation guided denoiser (HGD), Liao et
al. 2018, arXiv:1712.02976.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from robustbench_local.attacks import Attack
from robustbench_local.defenses.recipe import Recipe
from robustbench_local.defenses.settings import read_number, require_attack, require_budget
from robustbench_local.errors import UserError
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Step
from robustbench_local.types import Access, Images, Labels, Logits, Model

KEY = "defense.wrap.denoiser"


class Behind(nn.Module):
    """A classifier behind the denoiser that is trained; only the denoiser is part of it.

    The classifier is held in a tuple and so no submodule: switching this to train mode does not
    wake its batch statistics, and its weights are none of this module's.
    """

    def __init__(self, denoiser: nn.Module, classifier: Model) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._held = (classifier,)

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to the logits (N, K) of what is left of them."""
        logits: Logits = self._held[0](self.denoiser(x).clamp(0, 1))
        return logits


@dataclass(frozen=True, kw_only=True)
class OnClassifier(Attack):
    """An `attack` on the bare classifier, whoever is asked: what the denoiser was made for."""

    needs: ClassVar[Access] = "labels"

    attack: Attack
    classifier: Model = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "norms", self.attack.norms)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Images that fool the classifier; `model` is not asked."""
        return replace(self.attack, seed=self.seed)(self.classifier, x, y, threat)


@dataclass(frozen=True, kw_only=True)
class Denoising(Recipe):
    """Mean absolute error of pixels and of features, weighted, on perturbed images.

    `adversarial_share` of each batch is attacked on the bare `classifier`, each image with a radius
    of its own, uniform from 0 to the training budget where the attack serves that; the others get
    normal noise of a standard deviation uniform from 0 to `noise`. Features are the logits, or the
    output of the `layer` of the classifier, which is frozen and in eval mode. Raises `UserError`
    for values out of range and where nothing is left to learn.
    """

    adversarial: ClassVar[bool] = True

    attack: Attack
    threat: ThreatModel
    adversarial_share: float
    noise: float
    pixel_weight: float
    feature_weight: float
    layer: str | None
    classifier: Model | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        require_attack(f"{KEY}.attack", self.attack)
        require_budget(f"{KEY}.threat", self.threat)
        self.attack.require(self.threat)
        if self.layer is not None:  # on the command line layer=2 is a number
            object.__setattr__(self, "layer", str(self.layer))
        for name, most, expected in (
            ("noise", 1.0, "a standard deviation in pixel units, from 0 to 1"),
            ("pixel_weight", math.inf, "the weight of a loss, 0 or more"),
            ("feature_weight", math.inf, "the weight of a loss, 0 or more"),
            ("adversarial_share", 1.0, "the share of attacked images, from 0 to 1"),
        ):
            number = read_number(
                f"{KEY}.{name}",
                getattr(self, name),
                fits=_up_to(most),
                expected=expected,
                example=0.5,
            )
            object.__setattr__(self, name, number)
        if self.pixel_weight == self.feature_weight == 0:
            raise UserError(
                f"{KEY}.pixel_weight=0 and {KEY}.feature_weight=0 leave nothing to learn; expected "
                f"one above 0: type {KEY}.pixel_weight=1"
            )
        if self.adversarial_share == self.noise == 0:
            raise UserError(
                f"{KEY}.adversarial_share=0 and {KEY}.noise=0 leave nothing to take away; expected "
                f"one above 0: type {KEY}.noise=0.3"
            )

    def on(self, classifier: Model) -> Self:
        """The same recipe for one classifier. Raises `UserError` where it has no such layer."""
        self.check(classifier)
        return replace(self, classifier=classifier)

    def check(self, classifier: Model) -> None:
        """Raise `UserError` where a classifier, trained or not, has no such layer."""
        if self.layer is not None:
            find_layer(classifier, self.layer)

    @property
    def bare(self) -> Model:
        """The classifier without the denoiser."""
        assert self.classifier is not None, "call on(classifier) first"
        return self.classifier

    def loss(self, model: Model, step: Step) -> tuple[Tensor, Logits]:
        """See `Recipe.loss`; `model` is a `Behind`."""
        assert isinstance(model, Behind)
        x, seed = step.x, derive_seed(step.seed, "denoiser", step.number)
        cleaned = model.denoiser(self.perturb(x, step.y, seed))
        # Pixels as they come, since behind the clipping those outside the box have no gradient.
        loss = self.pixel_weight * l1_loss(cleaned, x)
        logits, features = self._look(cleaned.clamp(0, 1))
        if self.feature_weight > 0:
            with torch.no_grad():
                wanted = self._look(x)[1]
            loss = loss + self.feature_weight * l1_loss(features, wanted)
        return loss, logits

    def perturb(self, x: Images, y: Labels, seed: int) -> Images:
        """The images to learn from: the first ones attacked, the others noisy."""
        generator = torch.Generator(x.device).manual_seed(seed)
        share = torch.rand(len(x), generator=generator, device=x.device)
        count = round(self.adversarial_share * len(x))
        attack, threat = replace(self.attack, seed=seed), self.threat
        if attack.per_example_radius:
            threat = threat.per_example(share[:count].double() * threat.epsilon)
        attacked = attack(self.bare, x[:count], y[:count], threat)
        rest = x[count:]
        noise = torch.empty_like(rest).normal_(generator=generator)
        noisy = rest + self.noise * share[count:].view(-1, 1, 1, 1) * noise
        return torch.cat([attacked, noisy.clamp(0, 1)])

    def validation_attack(self) -> tuple[Attack, ThreatModel]:
        """The training attack at full budget, on the bare classifier."""
        return OnClassifier(attack=self.attack, classifier=self.bare), self.threat

    def _look(self, x: Images) -> tuple[Logits, Tensor]:
        """The classifier's logits, and the features that guide the denoiser."""
        if self.layer is None:
            logits: Logits = self.bare(x)
            return logits, logits
        seen: list[Tensor] = []

        def keep(layer: nn.Module, inputs: object, output: Tensor) -> None:
            seen.append(output)

        hook = find_layer(self.bare, self.layer).register_forward_hook(keep)
        try:
            logits = self.bare(x)
        finally:
            hook.remove()
        return logits, seen[-1]


def find_layer(model: Model, name: str) -> nn.Module:
    """A submodule by its name. Raises `UserError`, with the names there are, for another."""
    names = [each for each, _ in model.named_modules() if each]
    if name not in names:
        raise UserError(
            f"{KEY}.layer={name} is no layer of the model; expected one of "
            f"{', '.join(names)}: type {KEY}.layer=null for the logits"
        )
    return model.get_submodule(name)


def _up_to(most: float) -> Callable[[float], bool]:
    return lambda number: 0 <= number <= most

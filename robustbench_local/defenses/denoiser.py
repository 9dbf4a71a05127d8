"""A network in front of the classifier that has learnt to take perturbations away."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from robustbench_local.attacks import Attack
from robustbench_local.defenses.denoiser_training import KEY, Behind, Denoising
from robustbench_local.defenses.learned import learned_by
from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.settings import require_count
from robustbench_local.identity import class_version
from robustbench_local.threat import ThreatModel
from robustbench_local.training.schedule import Schedule
from robustbench_local.types import Images, Model

if TYPE_CHECKING:
    from robustbench_local.training.workshop import Workshop


class Residual(nn.Module):
    """x plus what a plain convolutional network makes of it, any channels and any size.

    DnCNN (Zhang et al. 2017, arXiv:1608.03981) on 2x2 pixels at a time as channels (FFDNet, Zhang
    et al. 2018, arXiv:1710.04026), which quarters the cost and doubles what one output sees.
    Deviations: without batch normalisation, which so few layers do not need. It starts as the
    identity.
    """

    def __init__(self, *, channels: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [4 * channels, *[width] * (depth - 1), 4 * channels]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Images) -> Tensor:
        """Images (N, C, H, W) to images of the same shape, not clipped."""
        height, width = x.shape[-2:]
        even = pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        change = pixel_shuffle(self.layers(pixel_unshuffle(even, 2)), 2)
        return x + change[..., :height, :width]


class Denoiser(Preprocess):
    """A learned denoiser, guided by the pixels and by what the classifier sees (HGD).

    Liao et al. 2018, arXiv:1712.02976; see `Residual` and `Denoising`. `fit` trains it for the
    classifier of the run without what is in front of it, however that was trained, through the
    cache; before that it cannot be used. At run time
    it is differentiable from end to end, which is what breaks it.

    - `width`, `depth`: channels and number of its convolutions.
    - `attack` within `threat`, the training budget, perturbs `adversarial_share` of each batch on
      the bare classifier; the others get normal noise of up to `noise`, in pixel units.
    - `pixel_weight`, `feature_weight`: of the two losses, not both 0; `layer` names the part of the
      classifier whose output is the feature, None for its logits.
    - `epochs`, `min_steps`, `batch_size`, `learning_rate`: its own training, see `Schedule`. The
      epoch is selected by the accuracy of the classifier behind it on validation images that the
      attack has perturbed.

    Deviations from the paper: a smaller network of another kind, images attacked afresh in every
    step, and on the one classifier that it protects. Raises `UserError` for values out of range.
    """

    differentiable = True

    def __init__(
        self,
        *,
        attack: Attack,
        threat: ThreatModel,
        noise: float = 0.3,
        adversarial_share: float = 0.5,
        pixel_weight: float = 1.0,
        feature_weight: float = 0.1,
        layer: str | None = None,
        width: int = 16,
        depth: int = 5,
        epochs: int = 2,
        min_steps: int = 600,
        batch_size: int = 128,
        learning_rate: float = 0.003,
        at_run_time: bool = True,
    ) -> None:
        super().__init__(at_run_time=at_run_time)
        self._recipe = Denoising(
            attack=attack,
            threat=threat,
            adversarial_share=adversarial_share,
            noise=noise,
            pixel_weight=pixel_weight,
            feature_weight=feature_weight,
            layer=layer,
        )
        self._size = {"width": width, "depth": depth}
        require_count(f"{KEY}.width", width, example=16)
        require_count(f"{KEY}.depth", depth, example=5, least=2)
        self._schedule = Schedule(
            epochs=epochs,
            min_steps=min_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup=0.2,
        )
        self.network: nn.Module | None = None
        self.learned: Mapping[str, Any] = {}
        """After `fit` what a record says of it, see `learned_by`."""

    def check(self, network: Model) -> None:
        """Raise `UserError` where the network, trained or not, has no such `layer`."""
        self._recipe.check(network)

    def fit(self, workshop: "Workshop") -> Self:
        """The same denoiser, trained for `workshop.network`, which stays as it is."""
        if workshop.network is None:
            raise ValueError("a denoiser is trained for a network and the workshop has none")
        classifier = copy.deepcopy(workshop.network.model).eval().requires_grad_(False)
        channels = workshop.data.input_shape[0]
        trained = workshop.train(
            lambda: Residual(channels=channels, **self._size),
            self._recipe.on(classifier),
            key={
                "denoiser": self._size,
                "code": class_version(Residual),
                "network": workshop.network.sha256,
            },
            schedule=self._schedule,
            through=lambda denoiser: Behind(denoiser, classifier),
        )
        fitted = copy.deepcopy(self)
        fitted.network = trained.model.requires_grad_(False)
        fitted.learned = learned_by(trained)
        return fitted

    def transform(self, x: Images) -> Images:
        """Images of the same shape, in [0, 1]."""
        if self.network is None:
            raise ValueError("the denoiser is not trained yet; call fit(workshop) first")
        cleaned: Images = self.network(x).clamp(0, 1)
        return cleaned

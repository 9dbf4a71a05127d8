"""Every image preprocessor of the Adversarial Robustness Toolbox (ART) by its name there."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from robustbench_local.attacks.known import what_may_suit, what_to_type
from robustbench_local.attacks.sandbox import importing_art, sandbox
from robustbench_local.defenses.drawing import Drawing
from robustbench_local.defenses.jpeg_codec import differentiable
from robustbench_local.defenses.median import median_filter
from robustbench_local.defenses.settings import require_kind
from robustbench_local.defenses.total_variation import TotalVariation
from robustbench_local.errors import UserError
from robustbench_local.gradients import pristine
from robustbench_local.types import Images

_LABELS = "it mixes images and their labels for training, and there are no labels at prediction"
_SOUND = "it is for sound"
_VIDEO = "it is for video"
_TENSORFLOW = "it needs TensorFlow"

REFUSED: Mapping[str, str] = {
    "CutMix": _LABELS,
    "CutMixPyTorch": _LABELS,
    "CutMixTensorFlowV2": _TENSORFLOW,
    "CutoutTensorFlowV2": _TENSORFLOW,
    "LabelSmoothing": "it changes labels in training and nothing at prediction; type "
    "train.label_smoothing=0.1",
    "Mixup": _LABELS,
    "MixupPyTorch": _LABELS,
    "MixupTensorFlowV2": _TENSORFLOW,
    "Mp3Compression": _SOUND,
    "Mp3CompressionPyTorch": _SOUND,
    "PixelDefend": "it needs a trained PixelCNN, which no configuration can name",
    "Resample": _SOUND,
    "SpatialSmoothingTensorFlowV2": _TENSORFLOW,
    "ThermometerEncoding": "it returns several channels for each, and the network is built for "
    "the channels of the dataset",
    "VideoCompression": _VIDEO,
    "VideoCompressionPyTorch": _VIDEO,
}

# Where the class has these. `channels_first` is how our images lie; by default many are off at
# prediction, and GaussianAugmentation appends noisy images to the batch instead of replacing it.
_OURS: Mapping[str, Any] = {
    "apply_fit": True,
    "apply_predict": True,
    "augmentation": False,
    "channels_first": True,
    "clip_values": (0.0, 1.0),
    "device_type": "cpu",  # where it is handed tensors it follows them
    "verbose": False,
}

_SLACK = 1e-5  # of rounding, at the ends of [0, 1]


class ArtPreprocessor(Drawing):
    """A preprocessor of ART (Nicolae et al. 2018, arXiv:1807.01069), images in and images out.

    - `name`: of a class in `art.defences.preprocessor`; `kwargs`: its parameters, but for those
      that follow from what images are here.
    - Classes with a parameter `channels_first` are given (N, C, H, W), all others (N, H, W, C),
      which is what they expect. float64 results come back in the type of the images.
    - Whether it draws random numbers is found by asking it. NumPy's and torch's global generators,
      which ART uses, are seeded from this module's own inside a call and as before after it.
    - The gradient (BPDA): that of the class where it is written in PyTorch, that of
      `jpeg_codec.differentiable` for its JPEG, of `median_filter` for its SpatialSmoothing and of
      `TotalVariation` for its TotalVarMin, else the identity. Of 100 MNIST images an undefended
      network behind TotalVarMin keeps 25 under PGD-10 at linf 0.1, with the identity instead 37.
    - Its own ways stay: JpegCompression cuts pixels off to 8 bits where `Jpeg` rounds them.

    Raises `UserError` for names and parameters that ART does not have or that cannot work here, and
    where the result has another shape or leaves [0, 1].
    """

    foreign: ClassVar[bool] = True
    """The version of the library decides what comes out."""

    def __init__(
        self,
        *,
        name: str = "JpegCompression",
        kwargs: Mapping[str, Any] | None = None,
        eot_samples: int = 20,
        in_training: bool = False,
        at_run_time: bool = True,
    ) -> None:
        super().__init__(eot_samples=eot_samples, in_training=in_training, at_run_time=at_run_time)
        self.name = name
        kind = _find(str(name))
        accepted = inspect.signature(kind).parameters
        given = {} if kwargs is None else kwargs
        require_kind(
            "defense.wrap.art.kwargs",
            given,
            Mapping,
            expected=f"the parameters of {name} by name",
            example="={}",
        )
        arguments = _arguments(name, accepted, given)
        self._given = list(given)
        self._channels_first = "channels_first" in accepted
        with pristine(self), sandbox(0, torch.device("cpu")):
            self._art = self._told(lambda: kind(**arguments))
        self._tensors = hasattr(self._art, "estimate_forward")
        self.randomized = self._draws()

    def draw(self, x: Images) -> Tensor:
        """A seed for the whole batch, once for each image."""
        return torch.randint(2**62, (1,), generator=self.generator("cpu")).expand(len(x))

    def transform_of(self, x: Images, drawn: Tensor) -> Images:
        """What ART makes of the images."""
        if not len(x):
            return x
        with pristine(self), sandbox(int(drawn[0]), x.device):
            return self._checked(self._told(lambda: self._call(x.detach())), x)

    def surrogate_of(self, x: Images, drawn: Tensor) -> Images:
        """ART's own differentiable estimate, ours for what is ours too, or the images."""
        if self.name == "JpegCompression" and x.shape[1] in (1, 3):
            return differentiable(x, torch.full((len(x),), self._art.quality))
        if self.name == "SpatialSmoothing":
            return median_filter(x, self._art.window_size)
        if self.name == "TotalVarMin":
            return TotalVariation().transform(x)
        if not self._tensors or not len(x):
            return x
        with pristine(self), sandbox(int(drawn[0]), x.device):
            estimate: Images = self._told(lambda: self._art.estimate_forward(self._laid(x)))
        return self._laid_back(estimate)

    def _call(self, x: Images) -> Images:
        if self._tensors:
            return self._laid_back(self._art.forward(self._laid(x))[0])
        # A copy: some write into what they are given.
        result, _ = self._art(self._laid(x).float().cpu().numpy().copy())
        return self._laid_back(torch.from_numpy(np.asarray(result)))

    def _laid(self, x: Images) -> Images:
        return x if self._channels_first else x.permute(0, 2, 3, 1)

    def _laid_back(self, x: Images) -> Images:
        return x if self._channels_first or x.ndim != 4 else x.permute(0, 3, 1, 2)

    def _checked(self, result: Tensor, x: Images) -> Images:
        if result.shape != x.shape:
            raise UserError(
                f"{self.name} of ART made {tuple(result.shape)} of images of shape "
                f"{tuple(x.shape)}; expected the same shape: change defense.wrap.art.kwargs"
            )
        images: Images = result.to(x).contiguous()
        low, high = float(images.min()), float(images.max())
        if not (low >= -_SLACK and high <= 1 + _SLACK):  # NaN too
            raise UserError(
                f"{self.name} of ART returned pixels from {low:g} to {high:g}; expected 0 to 1: "
                "change defense.wrap.art.kwargs"
            )
        return images.clamp(0, 1)

    def _draws(self) -> bool:
        """Whether other seeds make other images; an error where the same seed does."""
        x = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        first, again, second, third = (
            self.transform_of(x, torch.tensor([seed])) for seed in (0, 0, 1, 2)
        )
        if not torch.equal(first, again):
            raise UserError(
                f"{self.name} of ART draws random numbers that cannot be seeded; choose another "
                "defense"
            )
        return not (torch.equal(first, second) and torch.equal(first, third))

    def _told(self, ask: Callable[[], Any]) -> Any:
        """What ART answers, its errors in one sentence."""
        try:
            return ask()
        except torch.OutOfMemoryError:
            raise  # a smaller batch may do
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.name} of ART needs the package {error.name}, which is not installed; type "
                f"pip install {error.name}"
            ) from error
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.name} of ART failed with {type(error).__name__}: {told.rstrip('.')}; "
                f"{what_may_suit('defense.wrap.art', self._given)}"
            ) from error


def _find(name: str) -> Any:
    with importing_art():
        from art.defences import preprocessor
    found = {
        each: kind
        for each, kind in vars(preprocessor).items()
        if inspect.isclass(kind)
        and issubclass(kind, preprocessor.Preprocessor)
        and not inspect.isabstract(kind)
    }
    if name in REFUSED:
        raise UserError(f"defense.wrap.art.name={name} is refused: {REFUSED[name]}")
    if name not in found:
        usable = sorted(set(found) - set(REFUSED))
        folded = {each.lower(): each for each in usable}
        near = difflib.get_close_matches(str(name).lower(), folded, 1, 0.4)
        raise UserError(
            f"defense.wrap.art.name={name} is not a preprocessor of ART; expected one of "
            f"{', '.join(usable)}: type defense.wrap.art.name="
            f"{folded[near[0]] if near else usable[0]}"
        )
    return found[name]


def _arguments(
    name: str, accepted: Mapping[str, inspect.Parameter], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the class is built with. Raises `UserError` for what is not the user's to set."""
    free = [key for key in accepted if key not in _OURS]
    for key in kwargs:
        if key not in free:
            why = "set by the benchmark" if key in accepted else f"not a parameter of {name} of ART"
            raise UserError(
                f"defense.wrap.art.kwargs.{key} is {why}; expected "
                f"{what_to_type('defense.wrap.art.kwargs', key, free)}"
            )
    for key in free:
        if key not in kwargs and accepted[key].default is inspect.Parameter.empty:
            raise UserError(
                f"{name} of ART has no default for {key}; type defense.wrap.art.kwargs.{key}=VALUE"
            )
    return {**{key: value for key, value in _OURS.items() if key in accepted}, **kwargs}

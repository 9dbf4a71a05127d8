"""Random transforms whose surrogate meets the same draw as they themselves."""

from abc import abstractmethod

from torch import Tensor

from robustbench_local.defenses.preprocess import Preprocess
from robustbench_local.defenses.settings import require_count
from robustbench_local.types import Images


class Drawing(Preprocess):
    """A transform that draws once for every call, before it looks at the pixels.

    Subclasses say what they draw, one row for each image, and what becomes of the images given the
    draw. In a backward pass `surrogate_of` is given the draw of the transform it stands in for: one
    of its own would point the gradient at another image.
    """

    randomized = True

    def __init__(
        self, *, eot_samples: int = 20, in_training: bool = False, at_run_time: bool = True
    ) -> None:
        super().__init__(in_training=in_training, at_run_time=at_run_time)
        require_count("defense.wrap.NAME.eot_samples", eot_samples, example=20)
        self.eot_samples = eot_samples
        self._drawn: Tensor | None = None

    @abstractmethod
    def draw(self, x: Images) -> Tensor:
        """All that is random in one call, from `generator`; N rows."""

    @abstractmethod
    def transform_of(self, x: Images, drawn: Tensor) -> Images:
        """The exact transform under a draw."""

    @abstractmethod
    def surrogate_of(self, x: Images, drawn: Tensor) -> Images:
        """Its differentiable stand-in under the same draw."""

    def transform(self, x: Images) -> Images:
        """The exact transform under a fresh draw."""
        self._drawn = self.draw(x)
        return self.transform_of(x, self._drawn)

    def surrogate(self, x: Images) -> Images:
        """The stand-in of the last transform of as many images, or of a fresh draw; only once."""
        drawn, self._drawn = self._drawn, None
        if drawn is None or len(drawn) != len(x):
            drawn = self.draw(x)
        return self.surrogate_of(x, drawn)

    def reseed(self, seed: int) -> None:
        """Start the random draws anew from `seed`."""
        super().reseed(seed)
        self._drawn = None

"""Random changes of what comes into the layers of a network."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from robustbench_local.defenses.detection import Scorer
from robustbench_local.defenses.preprocess import Preprocess, Seeded
from robustbench_local.types import Images, Logits, Model


class RandomLayers(Seeded):
    """A model whose layers meet changed inputs. Subclasses say which layers, and what changes.

    Hooks do the work, for the time of a pass only: the model keeps its layers, the names of its
    weights and its own `forward`, and elsewhere answers as if nothing had happened.
    """

    randomized = True

    def __init__(self, model: Model, *, eot_samples: int) -> None:
        super().__init__()
        self.model = model
        self.eot_samples = eot_samples

    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The layers, those of the network itself: see `own_parts`."""

    @abstractmethod
    def change(self, entering: Tensor, place: int) -> Tensor:
        """What the layer reached as number `place`, from 0, is given instead; the same shape."""

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K); each image has its own draws."""
        with self._changing():
            logits: Logits = self.model(x)
        return logits

    @contextmanager
    def _changing(self) -> Iterator[None]:
        place = places()

        def change(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self.change(inputs[0], place(layer)), *inputs[1:])

        hooks = [layer.register_forward_pre_hook(change) for layer in self.layers()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def own_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a network, without those of a `Preprocess` or of a detector's `Scorer`."""
    yield model
    for part in model.children():
        if not isinstance(part, Preprocess | Scorer):
            yield from own_parts(part)


def places() -> Callable[[nn.Module], int]:
    """Tells the place of a layer, from 0, as the layers of a network are reached one by one.

    Reaching the first one again begins anew: a model may ask its network several times.
    """
    reached: list[nn.Module] = []

    def place(layer: nn.Module) -> int:
        if reached and layer is reached[0]:
            reached.clear()
        reached.append(layer)
        return len(reached) - 1

    return place

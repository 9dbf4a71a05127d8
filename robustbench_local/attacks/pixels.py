"""What the pixel attacks share: images with a few pixels painted over, and asking about many."""

from typing import ClassVar

import torch
from torch import Tensor

from robustbench_local.gradients import attack_loss, images_at_once, resists
from robustbench_local.oracle import ask
from robustbench_local.types import Images, Labels, Model


def paint(x: Images, rows: Tensor, places: Tensor, colours: Tensor) -> Images:
    """Copies of the images `rows` (M,) with pixels `places` (M, k) in `colours` (M, k, C).

    Every other pixel is the same to the last bit. Of equal places the last one counts.
    """
    channels = x.shape[1]
    painted = x.flatten(2)[rows]
    # One pixel after the other: one scatter with a place twice in it could end either way.
    for place, colour in zip(places.unbind(1), colours.unbind(1), strict=True):
        painted.scatter_(2, place[:, None, None].expand(-1, channels, 1), colour[:, :, None])
    return painted.view(-1, *x.shape[1:])


class Scorer:
    """Asks a victim about painted images, no more than `at_once` of them in one forward pass.

    `None` leaves it to `images_at_once`. Answers are the log-odds form of the cross-entropy (see
    `attack_loss`): it rises exactly as the true class's probability falls (that of a target rises),
    and goes on rising where the softmax saturates.
    """

    def __init__(
        self,
        model: Model,
        x: Images,
        y: Labels,
        *,
        targeted: bool,
        at_once: int | None,
        samples: int,
    ) -> None:
        self.x = x.contiguous()
        self._y = y
        self._model = model
        self._targeted = targeted
        self.at_once = at_once or images_at_once(x)
        self.samples = samples

    def __call__(self, rows: Tensor, places: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss (M,) over the samples, and whether all of them reached the goal (M,)."""
        parts = max(1, -(-len(rows) // self.at_once))  # of equal size: a small rest is no bargain
        losses, reached = [], []
        with torch.no_grad():
            for part in zip(
                *(value.tensor_split(parts) for value in (rows, places, colours)), strict=True
            ):
                y = self._y[part[0]]
                images = paint(self.x, *part)
                answers = [ask(self._model, images, part[0]) for _ in range(self.samples)]
                loss = [attack_loss(a, y, "ce", targeted=self._targeted) for a in answers]
                short = [resists(a, y, targeted=self._targeted) for a in answers]
                losses.append(torch.stack(loss).mean(0).to(self.x.dtype))
                reached.append(~torch.stack(short).any(0))
        return torch.cat(losses), torch.cat(reached)


class Memory:
    """What the victim said about painted images of each example, so that hardly any is asked twice.

    Images are told apart by exact numbers, `code`. The newest answers are kept, up to `SLOTS` for
    each example (12 bytes each); which ones depends on the example alone.
    """

    BITS: ClassVar[int] = 40
    """Codes have to be smaller than 2**BITS."""

    SLOTS: ClassVar[int] = 1 << 12

    def __init__(self, x: Images) -> None:
        places = len(x) * self.SLOTS
        self._keys = torch.full((places,), -1, dtype=torch.int64, device=x.device)
        self._answers = torch.zeros(places, dtype=x.dtype, device=x.device)

    @classmethod
    def fits(cls, pixels: int, places: int, channels: int) -> bool:
        """Whether 8-bit pixels of that many channels at that many places have short codes."""
        return pixels * ((places - 1).bit_length() + 8 * channels) <= cls.BITS

    @classmethod
    def keys(cls, rows: Tensor, places: Tensor, levels: Tensor, count: int) -> Tensor:
        """One number for each image: example, pixels and their 8-bit levels, shape (...)."""
        code = torch.zeros_like(places[..., 0])
        for place, level in zip(places.unbind(-1), levels.unbind(-2), strict=True):
            code = code * count + place
            for channel in level.unbind(-1):
                code = code * 256 + channel
        return (rows << cls.BITS) + code

    def recall(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Which images were asked about before, and the answers there; other answers mean nothing.

        Shapes (M,), (M,).
        """
        slots = self._slots(keys)
        return self._keys[slots] == keys, self._answers[slots]

    def store(self, keys: Tensor, answers: Tensor) -> None:
        """Keep the answers to different keys (M,)."""
        slots, order = self._slots(keys).sort(stable=True)
        # Of several for one slot the first: whichever comes last would be a race on a GPU.
        first = torch.ones_like(slots, dtype=torch.bool)
        first[1:] = slots[1:] != slots[:-1]
        slots, order = slots[first], order[first]
        self._keys[slots], self._answers[slots] = keys[order], answers[order]

    def _slots(self, keys: Tensor) -> Tensor:
        bits = self.SLOTS.bit_length() - 1
        code = keys & ((1 << self.BITS) - 1)
        # The highest bits of a product with an odd number close to 2**64 over the golden ratio.
        mixed = (code * -7046029254386353131) >> (64 - bits)
        return (keys >> self.BITS) * self.SLOTS + (mixed & (self.SLOTS - 1))


def representatives(keys: Tensor) -> Tensor:
    """For every key the position of the first one that equals it, shape (M,)."""
    ordered, order = keys.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    group = first.cumsum(0) - 1
    return torch.empty_like(order).scatter_(0, order, order[first][group])

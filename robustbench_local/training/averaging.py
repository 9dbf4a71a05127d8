"""An exponential moving average of the weights."""

import copy

import torch
from torch import Tensor, nn


class Average:
    """A copy of a model that follows it: average += (1 - decay) * (weights - average).

    At update t the decay is min(decay, (1 + t) / (10 + t)), so that the random start is soon
    forgotten. Buffers of floats (batch statistics) are averaged too, others copied. With `decay`
    None the copy is the model itself.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.updates = 0
        self.model = model if decay is None else copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are after an optimiser step."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        held, found = _split(self.model), _split(model)
        torch._foreach_lerp_(held[0], found[0], 1 - decay)
        for mine, theirs in zip(held[1], found[1], strict=True):
            mine.copy_(theirs)


def _split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floats among weights and buffers, and the rest."""
    tensors = [*model.parameters(), *model.buffers()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return floats, [tensor for tensor in tensors if not tensor.is_floating_point()]

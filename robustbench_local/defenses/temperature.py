"""A softmax so sharp that its loss has no gradient left."""

from dataclasses import dataclass

from torch import nn

from robustbench_local.defenses.settings import read_number
from robustbench_local.types import Images, Logits, Model


class Tempered(nn.Module):
    """A model whose logits are divided by a temperature; its predictions stay."""

    def __init__(self, model: Model, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, x: Images) -> Logits:
        """Pixels in [0, 1], shape (N, C, H, W), to logits (N, K)."""
        logits: Logits = self.model(x) / self.temperature
        return logits


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Division of the logits by `temperature`, above 0; far below 1 it saturates the softmax.

    What is left of defensive distillation (Papernot et al. 2016, arXiv:1511.04508) where nothing is
    distilled: the gradient of the cross-entropy vanishes in float32 and no prediction changes, so
    attacks on the margin of the logits are as strong as before. In the suite for what it shows of
    an attack; it protects nothing.
    """

    temperature: float = 0.01

    def __post_init__(self) -> None:
        value = read_number(
            "defense.wrap.temperature.temperature",
            self.temperature,
            fits=lambda value: value > 0,
            expected="a temperature above 0",
            example=0.01,
        )
        object.__setattr__(self, "temperature", value)

    def __call__(self, model: Model) -> Model:
        """What is deployed."""
        return Tempered(model, self.temperature)

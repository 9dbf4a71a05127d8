"""Images made on other models and handed to the victim as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import nn

from robustbench_local.attacks.ensemble import Ensemble
from robustbench_local.attacks.momentum import Momentum
from robustbench_local.errors import UserError
from robustbench_local.gradients import pristine
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model


@dataclass(frozen=True)
class Source:
    """A model to transfer from: its name in `attack.sources`, and which weights these are."""

    name: str
    model: nn.Module
    key: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Transfer(Momentum):
    """Momentum steps on other models than the victim, which is asked nothing.

    By default with input diversity and a smoothed gradient (MI-FGSM, arXiv:1710.06081; DI,
    arXiv:1803.06978; TI, arXiv:1904.02884), each of which has a switch: see `Momentum`.

    - `sources`: one or more of `seed:N` (the victim's architecture and training schedule without a
      defense, trained with that seed or found in the cache), `cache:KEY` (any weights in the cache,
      by the beginning of their key) and `file:PATH` (weights for the victim's architecture). Of
      several the mean of their logits is attacked, see `Ensemble`.

    Deviations: steps three times as long as in the papers, so that the sum of ten reaches the edge
    of the budget even where their signs differ (it carries over better). A target of
    `least_likely` is refused, since the victim alone could name it.
    """

    needs: ClassVar[Access] = "labels"

    step_size: float = 0.3
    diversity_probability: float = 0.5
    kernel_size: int = 5
    sources: Sequence[str] = ("seed:1001",)
    loaded: tuple[Source, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = isinstance(self.sources, Sequence) and not isinstance(self.sources, str)
        if not listed or not self.sources or not all(isinstance(s, str) for s in self.sources):
            raise UserError(
                f"attack.sources={self.sources}; expected a list of models, type for example "
                "attack.sources=[seed:1001,seed:1002]"
            )
        for name in self.sources:
            if split_source(name) is None:
                raise UserError(
                    f"attack.sources entry {name!r} cannot be read; expected seed:N, cache:KEY or "
                    "file:PATH: type for example attack.sources=[seed:1001]"
                )
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.target == "least_likely":
            raise UserError(
                "attack.target=least_likely needs the victim's scores, which attack Transfer does "
                "not ask for; expected random, next, the number of a class, or null"
            )

    def with_models(self, loaded: Sequence[Source]) -> Self:
        """The same attack with the models that `sources` stand for, all on the victim's device."""
        return replace(self, loaded=tuple(loaded))

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attack the sources; `model`, the victim, is not asked."""
        if not self.loaded:
            raise UserError("attack Transfer has no models yet; call with_models(models)")
        ensemble = Ensemble([source.model for source in self.loaded])
        with pristine(ensemble, seed=self.seed):
            return super().run(ensemble, x, y, threat)

    def report(self, threat: ThreatModel) -> Mapping[str, Any]:
        """Which weights the images were made on."""
        names = ("name", "key", "sha256")
        return {"sources": [{n: getattr(source, n) for n in names} for source in self.loaded]}


def split_source(name: str) -> tuple[str, str] | None:
    """The form and the value of an entry of `attack.sources`; None where it cannot be read."""
    form, _, value = name.partition(":")
    if form not in ("seed", "cache", "file") or not value:
        return None
    return None if form == "seed" and not value.isdecimal() else (form, value)

"""What the translation has to know about an attack of another library."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from robustbench_local.attacks.victim import Form
from robustbench_local.errors import UserError
from robustbench_local.types import Access, Norm


@dataclass(frozen=True, kw_only=True)
class Known:
    """One attack: what it serves and needs, and what its parameters mean."""

    norms: Mapping[Norm, Any]
    """The norms it serves, with its own name of each where it has a parameter `norm`."""
    needs: Access = "gradients"
    radius: str | None = "eps"
    """Its own parameter for epsilon; None: it looks for the smallest perturbation or knows none."""
    step: str | None = None
    """Its step size, which keeps its default proportion to the radius where it is not given."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that are not the user's to set."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Values of the paper that stand in for defaults far below them."""
    must_give: Mapping[str, str] = field(default_factory=dict)
    """Parameters without a usable default, and why."""
    target: Literal["no", "yes", "only"] = "yes"
    leaves_the_box: bool = False
    """Its steps leave [0, 1] by a little; the result is clipped."""
    one_by_one: bool = False
    """It works image by image anyway, so the draws of an image need not depend on its batch."""
    form: Form = "logits"
    """What it wants to be told."""
    channels: int | None = None
    classes: int = 2
    package: str | None = None
    """Another package it imports without declaring it."""

    def check(self, name: str, kwargs: Mapping[str, Any], accepted: Collection[str]) -> None:
        """Raise `UserError` for hyper-parameters of the attack `name` that are not the user's."""
        ours = {"norm": "threat.norm", "targeted": "attack.target", "seed": "seed"}
        if self.radius is not None:
            ours[self.radius] = "threat.epsilon"
        ours |= dict.fromkeys(set(self.fixed) - set(ours), "")
        for key in kwargs:
            if ours.get(key):
                raise UserError(
                    f"attack.kwargs.{key} is set by the benchmark; type {ours[key]}=VALUE instead"
                )
            if key not in accepted or key in ours:
                free = [each for each in accepted if each not in ours]
                raise UserError(
                    f"attack.kwargs.{key} is not a parameter of {name}; "
                    f"expected {', '.join(free) if free else 'none at all'}"
                )
        for key, reason in self.must_give.items():
            if key not in kwargs:
                raise UserError(
                    f"{name} has no usable default for {key}: {reason}; "
                    f"type attack.kwargs.{key}=VALUE"
                )

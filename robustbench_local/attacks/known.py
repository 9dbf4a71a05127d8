"""What the translation has to know about an attack of another library."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from robustbench_local.attacks.victim import Form
from robustbench_local.errors import UserError
from robustbench_local.types import Access, Norm


def what_to_type(place: str, key: str, free: Sequence[str]) -> str:
    """The end of a message about an unknown parameter of another library's class."""
    if not free:
        return f"none at all: type {place}={{}}"
    near = difflib.get_close_matches(key, free, 1)
    return f"one of {', '.join(free)}: type {place}.{near[0] if near else 'KEY'}=VALUE"


def what_may_suit(group: str, kwargs: Collection[str]) -> str:
    """The end of a message about another library's class that failed with these parameters."""
    typed = [*(f"{group}.kwargs.{key}=VALUE" for key in kwargs), f"{group}.name=NAME"]
    return f"expected images and parameters that suit it: type {' or '.join(typed)}"


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

    def _ours(self) -> dict[str, str]:
        """Parameters that the benchmark sets, with what to type instead, if anything."""
        ours = {"norm": "threat.norm", "targeted": "attack.target", "seed": "seed"}
        if self.radius is not None:
            ours[self.radius] = "threat.epsilon"
        return ours | dict.fromkeys(set(self.fixed) - set(ours), "")

    def free(self, accepted: Collection[str]) -> list[str]:
        """Those of the parameters `accepted` by the attack that are the user's to set."""
        return [key for key in accepted if key not in self._ours() and key != "verbose"]

    def check(self, name: str, kwargs: Mapping[str, Any], accepted: Collection[str]) -> None:
        """Raise `UserError` for hyper-parameters of the attack `name` that are not the user's."""
        ours = self._ours()
        for key in kwargs:
            if ours.get(key):
                raise UserError(
                    f"attack.kwargs.{key} is set by the benchmark; type {ours[key]}=VALUE instead"
                )
            if key not in accepted or key in ours:
                raise UserError(
                    f"attack.kwargs.{key} is not a parameter of {name}; expected "
                    f"{what_to_type('attack.kwargs', key, self.free(accepted))}"
                )
        for key, reason in self.must_give.items():
            if key not in kwargs:
                raise UserError(
                    f"{name} has no usable default for {key}: {reason}; "
                    f"type attack.kwargs.{key}=VALUE"
                )

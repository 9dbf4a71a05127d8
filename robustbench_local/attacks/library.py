"""What attacks of other libraries share: their conventions are translated to ours here, once."""

import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from robustbench_local.attacks.base import Attack
from robustbench_local.attacks.known import Known, what_may_suit, what_to_type
from robustbench_local.attacks.sandbox import sandbox
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.attacks.victim import Budget, SpentError, Victim, mend
from robustbench_local.errors import UserError
from robustbench_local.gradients import is_randomized, pristine
from robustbench_local.oracle import Oracle
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm

if TYPE_CHECKING:
    from robustbench_local.data import Dataset


@dataclass(frozen=True, kw_only=True)
class LibraryAttack(Attack):
    """An attack of another library by its `name` there, with its own hyper-parameters in `kwargs`.

    What the translation does: epsilon and norm are the threat model's, never in `kwargs`; step
    sizes are in pixel units as there, and keep their default proportion to the radius where they
    are not given; labels are the true ones, or those of `target`; everything random is seeded from
    `seed` and the pixels of the batch.

    Attacks without a radius of their own return what they found where it is inside epsilon, else
    the clean image. Under a query budget images are attacked one by one, and the smallest
    misclassified candidate asked about is the result once the budget is spent; attacks without a
    radius that work image by image always return it, where the victim is deterministic.
    """

    needs: ClassVar[Access] = "gradients"  # of each, see __post_init__
    norms: ClassVar[frozenset[Norm]] = frozenset()
    foreign: ClassVar[bool] = True
    serves_rejection: ClassVar[bool] = False
    library: ClassVar[str]
    package: ClassVar[str]
    known: ClassVar[Mapping[str, Known]]
    refused: ClassVar[Mapping[str, str]]

    name: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Target = None

    def __post_init__(self) -> None:
        check_target(self.target)
        how = self._find()
        # By its name: what the class says holds for none of them.
        object.__setattr__(self, "needs", how.needs)
        object.__setattr__(self, "norms", frozenset(how.norms))
        object.__setattr__(self, "minimum_norm", how.radius is None)
        if not isinstance(self.kwargs, Mapping):
            raise UserError(
                f"attack.kwargs={self.kwargs} is not a mapping; expected "
                f"{what_to_type('attack.kwargs', '', how.free(self.parameters()))}"
            )
        object.__setattr__(self, "kwargs", {key: _plain(v) for key, v in self.kwargs.items()})
        how.check(f"{self.name} of {self.library}", self.kwargs, self.parameters())
        if self.target is not None and how.target == "no":
            raise UserError(
                f"attack.target={self.target}, but {self.name} of {self.library} cannot aim at a "
                "class; type attack.target=null or choose another attack"
            )
        if self.target is None and how.target == "only":
            raise UserError(
                f"{self.name} of {self.library} can only aim at a class; type for example "
                "attack.target=random"
            )

    @property
    def how(self) -> Known:
        """What is known about the attack."""
        return self.known[self.name]

    def _find(self) -> Known:
        if self.name in self.refused:
            raise UserError(
                f"attack.name={self.name} of {self.library} is refused: {self.refused[self.name]}"
            )
        if self.name not in self.known:
            folded = {name.lower(): name for name in [*self.known, *self.refused]}
            near = difflib.get_close_matches(str(self.name).lower(), folded, 3, 0.4)
            names = [folded[each] for each in near] or sorted(self.known)
            raise UserError(
                f"attack.name={self.name} is not an attack of {self.library}; closest are "
                f"{', '.join(names)}: type attack.name={names[0]}"
            )
        how = self.known[self.name]
        if how.package is not None and importlib.util.find_spec(how.package) is None:
            raise UserError(
                f"{self.name} of {self.library} needs the package {how.package}, which is not "
                f"installed; type pip install {how.package}"
            )
        return how

    def report(self, threat: ThreatModel) -> Mapping[str, Any]:
        """Whose attack it was, and which of its defaults were replaced."""
        version = importlib.metadata.version(self.package)
        replaced = {key: v for key, v in self.how.paper.items() if key not in self.kwargs}
        whose = {"library": f"{self.name} of {self.library} {version}"}
        return {**whose, "replaced_defaults": replaced} if replaced else whose

    def arguments(self, threat: ThreatModel, classes: int, seed: int = 0) -> dict[str, Any]:
        """All that the attack is built with."""
        how, accepted = self.how, self.parameters()
        given = {**how.paper, **self.kwargs, **how.fixed}
        if how.radius is not None:
            pixels = threat.norm == "l0"
            given[how.radius] = int(threat.epsilon) if pixels else threat.epsilon
        if how.step is not None and how.step not in given and how.radius is not None:
            default, radius = accepted[how.step].default, accepted[how.radius].default
            given[how.step] = default / radius * threat.epsilon
        given |= {
            key: value
            for key, value in {
                "norm": how.norms[threat.norm],
                "n_classes": classes,
                "seed": seed % 2**31,
                "targeted": self.target is not None,
                "verbose": False,
            }.items()
            if key in accepted
        }
        if "batch_size" in accepted:  # some ask about one image at a time by default
            given.setdefault("batch_size", max(accepted["batch_size"].default, 128))
        return given

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """What the library finds, where it is inside epsilon or the judge has to know."""
        found = self._search(model, x, y, threat)
        if self.how.radius is not None:
            return found
        inside = threat.size(found, x) <= threat.epsilon
        return torch.where(inside.view(-1, 1, 1, 1), found, x)

    def nearest(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """What an attack without a radius found, whatever its size; not every one is verified."""
        self.require(threat)
        with pristine(model, seed=self.seed):
            return self._search(model, x.detach(), y, threat)

    def _search(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        x = x.contiguous()
        wanted, targeted = self.goal(model, x, y)
        classes = self._classes(model, x)
        rows = torch.arange(len(x), device=x.device)
        alone = self.how.one_by_one or threat.query_budget is not None
        left = None if threat.query_budget is None else threat.query_budget - int(targeted)
        found = x.clone()
        for part in torch.split(rows, 1 if alone else len(x)):
            victim = Victim(
                model,
                classes,
                x[part],
                wanted[part],
                threat,
                targeted=targeted,
                form=self.how.form,
                budget=Budget(int(part[0]), left) if alone else None,
                watch=alone
                and (left is not None or self.how.radius is None)
                and not is_randomized(model),
            )
            aim = wanted[part] if targeted else None
            found[part] = self._attack(victim, x[part], y[part], aim, threat, classes)
        return found

    def _attack(
        self,
        victim: Victim,
        x: Images,
        y: Labels,
        wanted: Labels | None,
        threat: ThreatModel,
        classes: int,
    ) -> Images:
        """One call of the library, and what came back as images of ours."""
        # Of the pixels too: no two batches may meet the same draws.
        digest = hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()
        seed = derive_seed(self.seed, self.library, self.name, digest)
        arguments = self.arguments(threat, classes, seed)
        result: Any = None  # an array or a tensor
        try:
            with sandbox(seed, x.device):
                result = self.call(victim, x, y, wanted, arguments)
        except SpentError:
            pass
        except (UserError, torch.OutOfMemoryError):
            raise
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.name} of {self.library} needs the package {error.name}, which is not "
                f"installed; type pip install {error.name}"
            ) from error
        except Exception as error:
            if victim.error is not None:
                raise victim.error from None
            told = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"{self.name} of {self.library} failed with {type(error).__name__}: {told}; "
                f"{what_may_suit('attack', self.kwargs)}"
            ) from error
        if victim.error is not None:  # swallowed on the way
            raise victim.error
        seen: Images | None = victim.smallest
        if result is None:
            return x if seen is None or self._too_far(seen, x, threat) else seen
        # What it found itself may be better than what it asked about, although it was not checked.
        if not isinstance(result, Tensor):
            result = torch.from_numpy(np.asarray(result))
        images: Images = result.detach().to(x)
        if self.how.leaves_the_box:
            images = images.clamp(0, 1)
        images = mend(images, x, threat)
        if seen is None or bool(threat.size(seen, x) > threat.epsilon >= threat.size(images, x)):
            return images
        return seen if self.how.radius is None else images

    def _too_far(self, x_adv: Images, x: Images, threat: ThreatModel) -> bool:
        """Whether one image is no answer: of attacks without a radius every one is."""
        return self.how.radius is not None and bool(threat.size(x_adv, x) > threat.epsilon)

    def check(self, data: "Dataset", threat: ThreatModel) -> None:
        """Raise `UserError` also for a number of classes or channels that the attack cannot do."""
        super().check(data, threat)
        self._check(data.num_classes, data.input_shape[0])

    def _classes(self, model: Model, x: Images) -> int:
        """The number of classes. Raises `UserError` where the attack cannot work on it."""
        if isinstance(model, Oracle):
            classes = model.num_classes
        else:
            with torch.no_grad():
                classes = int(model(x[:1]).shape[1])
        self._check(classes, x.shape[1])
        return classes

    def _check(self, classes: int, channels: int) -> None:
        how = self.how
        if classes < how.classes:
            raise UserError(
                f"{self.name} of {self.library} needs at least {how.classes} classes and the model "
                f"has {classes}; choose another attack"
            )
        if how.channels is not None and channels != how.channels:
            raise UserError(
                f"{self.name} of {self.library} works on images of {how.channels} channels and "
                f"these have {channels}; choose another attack"
            )

    @abstractmethod
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the library's attack by name, without the model."""

    @abstractmethod
    def call(
        self,
        victim: Victim,
        x: Images,
        y: Labels,
        wanted: Labels | None,
        arguments: dict[str, Any],
    ) -> Any:
        """Run the library's attack; `y` are the true labels, `wanted` the targets if any."""


def _plain(value: Any) -> Any:
    """Lists and mappings as Python has them, whatever the configuration made of them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return value
    return [_plain(part) for part in value]

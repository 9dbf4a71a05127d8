"""What every attack is: a frozen set of hyper-parameters that can be called."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from robustbench_local.attacks.target import check_class, choose_targets
from robustbench_local.errors import UserError
from robustbench_local.gradients import pristine
from robustbench_local.rejection import abstains
from robustbench_local.threat import ThreatModel, check_box
from robustbench_local.types import Access, Images, Labels, Model, Norm

if TYPE_CHECKING:
    from robustbench_local.data import Dataset, Split
    from robustbench_local.oracle import Oracle


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Finds, for each image, a perturbed one inside the threat model that the victim gets wrong.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters in natural units, none
    of them the budget. They say what they `need`, which `norms` they serve, and implement `run`.
    `seed` decides every random draw, together with the pixels of the example. Those that can aim
    at a class have a field `target`, see `attacks.target`.

    `per_example_radius` says that the attack serves threat models with a radius for each example,
    `minimum_norm` that it looks for the smallest perturbation whatever epsilon is: either way a
    curve over epsilons takes one pass. `foreign` that another library does the work: its draws
    come from global generators in the order of the batch. Without `serves_rejection` an attack
    would take a rejected image for a broken one, and refuses victims that may reject.
    """

    needs: ClassVar[Access]
    norms: ClassVar[frozenset[Norm]]
    per_example_radius: ClassVar[bool] = False
    minimum_norm: ClassVar[bool] = False
    foreign: ClassVar[bool] = False
    serves_rejection: ClassVar[bool] = True

    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What `run` wants `report` to say. Whoever gives up a batch half-way puts it back."""

    def check(self, data: "Dataset", threat: ThreatModel) -> None:
        """Raise `UserError` for what cannot work on the data, before a model is trained for it."""
        threat.check_fits(data.input_shape)
        check_class(getattr(self, "target", None), data.num_classes)

    def fit(self, oracle: "Oracle", data: "Split", threat: ThreatModel) -> Self:
        """Prepare on the attacker's own data, none of it evaluated; substitute attacks train here.

        What it asks the oracle is counted. The default needs nothing.
        """
        return self

    @property
    def draws_averaged(self) -> int:
        """Forward passes averaged for each look at the victim: 1 proves nothing of a random one."""
        return int(getattr(self, "eot_samples", 1))

    def report(self, threat: ThreatModel) -> Mapping[str, Any]:
        """What the record of that threat model says beside accuracies, as JSON holds it."""
        return {}

    def fold(self, reports: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The report of one evaluation from those of its shards, at one radius.

        By default all that any of them says, and the list of what each says where they differ.
        """
        keys = {key: None for report in reports for key in report}
        said = {key: [report[key] for report in reports if key in report] for key in keys}
        return {
            key: values[0] if all(value == values[0] for value in values) else values
            for key, values in said.items()
        }

    def goal(self, model: Model, x: Images, y: Labels) -> tuple[Labels, bool]:
        """The labels the attack works on, and whether these are classes it wants (a `target`)."""
        target = getattr(self, "target", None)
        if target is None:
            return y, False
        with pristine(model, seed=self.seed):
            return choose_targets(target, model, x, y, seed=self.seed), True

    def __call__(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Perturbed images, same shape, type and device as `x`; `x` itself is not modified.

        `y` are the true labels. Nothing of the model or the global random states is left changed,
        also after an exception. Raises `UserError` for a norm, an access or a victim it cannot
        serve.
        """
        self.require(threat)
        if abstains(model):
            self.require_rejection()
        threat.check_fits(x.shape[1:])
        check_batch(x, y)
        x = x.detach()
        if threat.epsilon == 0 or len(x) == 0:
            return x.clone()
        with pristine(model, seed=self.seed):
            return self.run(model, x, y, threat)

    def require(self, threat: ThreatModel) -> None:
        """Raise `UserError` where this attack does not fit the threat model."""
        name = getattr(self, "name", type(self).__name__)
        if threat.norm not in self.norms:
            serves = ", ".join(sorted(self.norms))
            raise UserError(
                f"attack {name} does not serve threat.norm={threat.norm}; it serves {serves}: "
                f"type threat.norm={min(self.norms)} and a threat.epsilon that suits it, or "
                "choose another attack"
            )
        if not threat.allows(self.needs):
            raise UserError(
                f"attack {name} needs access to {self.needs} and threat.access={threat.access} "
                f"grants less; type threat.access={self.needs} or choose another attack"
            )
        if getattr(self, "target", None) == "least_likely" and not threat.allows("scores"):
            raise UserError(
                f"attack.target=least_likely needs scores and threat.access={threat.access} grants "
                "less; type threat.access=scores or attack.target=random"
            )

    def require_rejection(self) -> None:
        """Raise `UserError` where this attack takes a rejection for an error of the victim."""
        if not self.serves_rejection:
            name = getattr(self, "name", type(self).__name__)
            raise UserError(
                f"attack {name} would count images that the defense rejects as broken; type "
                "attack=standard, attack=pgd or attack=square, or awareness=oblivious to attack "
                "the network alone"
            )

    @abstractmethod
    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """The attack itself; the model is frozen and in eval mode, `threat.epsilon` above 0."""


def check_batch(x: Images, y: Labels) -> None:
    """Raise `UserError` for images that are none, and for labels that do not go with them."""
    if x.dim() != 4 or not x.is_floating_point():
        raise UserError(
            f"images are {x.dtype} of shape {tuple(x.shape)}; expected float32 of shape "
            "(N, C, H, W) with pixels in [0, 1]: type x.float() / 255 for 8-bit images"
        )
    if y.dtype != torch.int64 or y.shape != (len(x),):
        raise UserError(
            f"labels are {y.dtype} of shape {tuple(y.shape)}; expected int64 of shape ({len(x)},), "
            "one for each image: type y.long()"
        )
    check_box(x)


def require_count(name: str, value: object) -> None:
    """Raise `UserError` unless a hyper-parameter that counts something is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"attack.{name}={value}; expected a whole number, 1 or more")

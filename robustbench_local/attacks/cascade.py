"""Several attacks one after the other, each on the survivors of the ones before."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from torch import Tensor

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.transfer import Transfer
from robustbench_local.errors import UserError
from robustbench_local.gradients import is_randomized, resists, seed_global
from robustbench_local.oracle import Oracle, is_settled
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model

if TYPE_CHECKING:
    from robustbench_local.data import Dataset, Split

DRAWS = 10
"""Looks at an image of a randomised victim, where `eot_samples` are fewer."""


@dataclass(frozen=True, kw_only=True)
class Cascade(Attack):
    """The worst case, image by image, over several attacks (as AutoAttack, arXiv:2003.01690).

    - `parts`: the attacks by name, in order. Each starts from the clean images that the ones before
      left unbroken. After each the victim is asked again which images are broken.
    - `skip_if_random`, `only_if_random`: names of parts that randomised victims do not meet, since
      they look for a boundary that moves or for single lucky answers, and that only these meet.
    - `eot_samples`: forward passes in each such question, of a randomised victim 10 at least: its
      images go through every part until all of them are wrong, what is wrong most often is kept,
      and broken in the report is what most of them get wrong.

    The parts want any wrong class and share no query budget, so a threat model with one is refused.
    """

    parts: Mapping[str, Attack]
    skip_if_random: Sequence[str] = ()
    only_if_random: Sequence[str] = ()
    eot_samples: int = 1

    def __post_init__(self) -> None:
        require_count("eot_samples", self.eot_samples)
        # Plain ones: a configuration brings its own kinds of mapping and list.
        parts = {str(name): part for name, part in self.parts.items()}
        object.__setattr__(self, "parts", parts)
        for key in ("skip_if_random", "only_if_random"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
            for name in getattr(self, key):
                if name not in parts:
                    raise UserError(
                        f"attack.{key} names {name}; expected some of attack.parts "
                        f"({', '.join(parts)}): type attack.{key}=[]"
                    )
        for name, part in parts.items():
            if not isinstance(part, Attack):
                raise UserError(
                    f"attack.parts.{name} is {type(part).__name__}; expected an attack: type "
                    f"attack.parts.{name}._target_=robustbench_local.attacks.PGD"
                )
            if isinstance(part, Transfer):
                raise UserError(
                    f"attack.parts.{name} is a transfer attack, whose models only a run of its own "
                    "loads; type attack=transfer in another run"
                )
            if getattr(part, "target", None) is not None:
                raise UserError(
                    f"attack.parts.{name}.target={part.target}; the parts of a cascade want any "  # type: ignore[attr-defined]
                    f"wrong class: type attack.parts.{name}.target=null"
                )
        if not parts:
            raise UserError(
                "attack.parts is empty; expected one attack at least: type for example "
                "+attack.parts.pgd._target_=robustbench_local.attacks.PGD"
            )
        for kind, randomized in (("random", True), ("deterministic", False)):
            if not self._met_by(randomized=randomized):
                raise UserError(
                    f"attack.skip_if_random and attack.only_if_random leave no part for {kind} "
                    "victims; expected one at least: type attack.skip_if_random=[]"
                )
        # What holds for every cascade of a kind elsewhere is here a matter of its parts.
        norms = frozenset.intersection(*(part.norms for part in parts.values()))
        greatest = min((part.needs for part in parts.values()), key=get_args(Access).index)
        object.__setattr__(self, "norms", norms)
        object.__setattr__(self, "needs", greatest)

    def check(self, data: "Dataset", threat: ThreatModel) -> None:
        """Every part has to work on the data."""
        for part in self.parts.values():
            part.check(data, threat)

    def fit(self, oracle: Oracle, data: "Split", threat: ThreatModel) -> Self:
        """Prepare every part."""
        fitted = {name: part.fit(oracle, data, threat) for name, part in self.parts.items()}
        return replace(self, parts=fitted)

    def require(self, threat: ThreatModel) -> None:
        """Raise `UserError` where a part does not fit the threat model."""
        super().require(threat)
        if threat.query_budget is not None:
            raise UserError(
                f"threat.query_budget={threat.query_budget} cannot be shared out among the parts "
                "of a cascade; type threat.query_budget=null or choose one of its parts as attack"
            )
        for part in self.parts.values():
            part.require(threat)

    def require_rejection(self) -> None:
        """Raise `UserError` where a part takes a rejection for an error of the victim."""
        for part in self.parts.values():
            part.require_rejection()

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Every part on what is left, and a look at what it made of it."""
        random = not is_settled(model, self.eot_samples)
        draws = max(self.eot_samples, DRAWS) if is_randomized(model) else self.eot_samples
        best = x.clone()
        worst = torch.full((len(x),), -1.0, device=x.device)  # the highest share of wrong draws
        parts = self._met_by(randomized=is_randomized(model))
        tally = {name: _Line() for name in parts}
        for place, (name, part) in enumerate(parts.items()):
            rows = (worst < 1).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            counter = _Counter(model, x)
            x_adv = part(model, x[rows], y[rows], threat[rows])
            if random:
                # The part began with the draws that would come now.
                seed_global(derive_seed(self.seed, "cascade", place))
            wrong = _share_wrong(model, x_adv, y[rows], draws)
            broken = int(((wrong > 0.5) & (worst[rows] <= 0.5)).sum())
            better = (wrong > worst[rows]).nonzero().squeeze(1)
            best[rows[better]] = x_adv[better]
            worst[rows[better]] = wrong[better]
            tally[name] = counter.line(attacked=len(rows), broken=broken)
        lines = self.notes.setdefault(_place(threat), {})
        for name, line in tally.items():
            lines[name] = lines.get(name, _Line()) + line
        return best

    def _met_by(self, *, randomized: bool) -> dict[str, Attack]:
        left_out = self.skip_if_random if randomized else self.only_if_random
        return {name: part for name, part in self.parts.items() if name not in left_out}

    @property
    def draws_averaged(self) -> int:
        """Those of the part that takes fewest: `eot_samples` is about the looks after each."""
        return min(part.draws_averaged for part in self._met_by(randomized=True).values())

    def report(self, threat: ThreatModel) -> Mapping[str, Any]:
        """`parts`, for each: images attacked and broken, passes, seconds, and its own report.

        Passes are 0 where the model does not count them.
        """
        lines = self.notes.get(_place(threat), {})
        return {
            "parts": [
                {"name": name, **vars(lines.get(name, _Line())), **part.report(threat)}
                for name, part in self.parts.items()
                if name in lines or not lines
            ]
        }

    def fold(self, reports: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """What each part did in all shards together."""
        counts = [each.name for each in fields(_Line)]
        said: dict[str, list[dict[str, Any]]] = {}
        for report in reports:
            for line in report["parts"]:
                said.setdefault(line["name"], []).append(line)
        folded = []
        for name in sorted(said, key=list(self.parts).index):
            tallies = [_Line(*(line[key] for key in counts)) for line in said[name]]
            own = [
                {key: value for key, value in line.items() if key not in ("name", *counts)}
                for line in said[name]
            ]
            total = vars(sum(tallies, _Line()))
            folded.append({"name": name, **total, **self.parts[name].fold(own)})
        return {"parts": folded}


@dataclass(frozen=True)
class _Line:
    """What one part did, over all batches so far."""

    attacked: int = 0
    broken: int = 0
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0

    def __add__(self, other: "_Line") -> "_Line":
        return _Line(*(mine + more for mine, more in zip(self._all(), other._all(), strict=True)))

    def _all(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


class _Counter:
    """What the part that runs now has cost, its look included."""

    def __init__(self, model: Model, x: Images) -> None:
        self._model, self._x = model, x
        self._before = self._now()

    def line(self, *, attacked: int, broken: int) -> _Line:
        forward, backward, seconds = (
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )
        return _Line(attacked, broken, int(forward), int(backward), seconds)

    def _now(self) -> tuple[int, int, float]:
        if self._x.is_cuda:
            torch.cuda.synchronize(self._x.device)
        counts = (0, 0)
        if isinstance(self._model, Oracle):
            counts = self._model.forward_passes, self._model.backward_passes
        return *counts, time.perf_counter()


def _place(threat: ThreatModel) -> str:
    """Where the notes about one threat model are kept."""
    return f"{threat.norm} {threat.epsilon!r}"


def _share_wrong(model: Model, x: Images, y: Labels, draws: int) -> Tensor:
    """The share of the draws that the victim accepts and gets wrong, shape (N,)."""
    with torch.no_grad():
        wrong = [~resists(model(x), y) for _ in range(draws)]
    return torch.stack(wrong).float().mean(0)

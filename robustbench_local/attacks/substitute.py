"""A substitute trained on the victim's labels, attacked in the victim's place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.ensemble import Ensemble
from robustbench_local.attacks.imitation import (
    augment,
    new_points,
    predict,
    signed_step,
    slices,
    stratified,
    train,
)
from robustbench_local.attacks.momentum import Momentum
from robustbench_local.attacks.transfer import Transfer
from robustbench_local.errors import UserError
from robustbench_local.gradients import pristine, seed_global
from robustbench_local.models import Normalized, PooledCNN, SmallCNN, pixel_statistics
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm

if TYPE_CHECKING:
    from robustbench_local.data import Dataset, Split
    from robustbench_local.oracle import Oracle

MEASURED = 1000
"""Held-out images, at most, on which the harness measures how good the substitute is."""

FGSM = Momentum(steps=1, step_size=1.0, samples=16, noise=0.4)
"""One full step, the attack of the paper, along a gradient averaged over noisy copies."""


COMMITTEE = (
    partial(SmallCNN, width=16, hidden=100),
    partial(SmallCNN, width=16, hidden=100),
    partial(PooledCNN, width=8, kernel_size=5),
    partial(PooledCNN, width=8, kernel_size=7),
)
"""Two kinds of small networks: images that fool both are likelier to fool a third."""


@dataclass(frozen=True, kw_only=True)
class Substitute(Attack):
    """The attack of Papernot et al. 2017 (arXiv:1602.02697), which asks for labels only.

    `fit` takes `seeds` images of the attacker's own (held-out images, so that none of them is ever
    evaluated), equally many of each class, and lets the victim label them. In each of `rounds` it
    trains the substitute further on all it has, and then, but for the last time, adds to each point
    the one that lies `augmentation_step` along the sign of the gradient of the substitute's output
    for the victim's label, labelled by the victim in turn. `run` attacks the substitute with
    `inner` and hands the images on: at that time the victim is not asked.

    - `augmentation_step` above 0 goes towards the label first, below 0 away from it; every `period`
      rounds the sign changes (null: never).
    - `doubling_rounds`: after so many augmentations only `reservoir` points, drawn evenly from all,
      are augmented at a time (this and `period`: Papernot et al. 2016, arXiv:1605.07277).
    - `query_budget`: labels in all, kept to by augmenting fewer points at the end if need be. The
      budget of the threat model, for each example attacked, is not touched.
    - `epochs` per round, `learning_rate` (Adam), `batch_size`, and `shift`, the pixels by which
      images are moved at random in training.
    - `models`: the members of the substitute, each made from `input_shape` and `num_classes` and
      trained by itself. Their mean logits count; one member is the attack of the paper. Pixels are
      normalised in front of them by the mean and deviation of the seeds.
    - `inner`: the attack on the substitute. Best without an early stop: a point just across the
      substitute's boundary is seldom across the victim's.

    Deviations: a committee, shifts, and a step that goes away from the label first and as far as
    the attack on MNIST will, since labels of points near those that are attacked teach most (all
    three make it stronger). Synthetic points are clipped to [0, 1], as any victim that takes images
    would. Adam, as in the authors' later implementation, but seeds labelled by the victim, as in
    the paper.
    """

    needs: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2"})

    seeds: int = 150
    rounds: int = 6
    augmentation_step: float = -0.3
    period: int | None = 1
    doubling_rounds: int = 5
    reservoir: int = 400
    query_budget: int = 6400
    epochs: int = 10
    learning_rate: float = 0.001
    batch_size: int = 128
    shift: int = 1
    models: Sequence[Callable[..., nn.Module]] = COMMITTEE
    inner: Attack = FGSM
    fitted: "Fitted | None" = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in (
            "seeds", "rounds", "reservoir", "query_budget", "epochs", "batch_size"
        ):  # fmt: skip
            require_count(name, getattr(self, name))
        if self.period is not None:
            require_count("period", self.period)
        for name in ("doubling_rounds", "shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"attack.{name}={value}; expected a whole number, 0 or more")
        if not self.learning_rate > 0:
            raise UserError(f"attack.learning_rate={self.learning_rate}; expected a number above 0")
        if not 0 < abs(self.augmentation_step) <= 1:
            raise UserError(
                f"attack.augmentation_step={self.augmentation_step}; expected a number of pixel "
                "units from -1 to 1 that is not 0"
            )
        if self.query_budget < self.seeds:
            raise UserError(
                f"attack.query_budget={self.query_budget} does not pay for the labels of "
                f"attack.seeds={self.seeds} images; raise the one or lower the other"
            )
        listed = isinstance(self.models, Sequence) and len(self.models) > 0
        if not listed or not all(callable(model) for model in self.models):
            raise UserError(
                f"attack.models={self.models}; expected a list of networks, each with _target_ and "
                "_partial_: true, see conf/attack/substitute.yaml"
            )
        object.__setattr__(self, "models", tuple(self.models))
        if not isinstance(self.inner, Attack):
            raise UserError(
                f"attack.inner is a {type(self.inner).__name__}; expected an attack with _target_, "
                "for example attack.inner._target_=robustbench_local.attacks.Momentum"
            )
        if isinstance(self.inner, Transfer | Substitute):
            raise UserError(
                f"attack.inner is a {type(self.inner).__name__}, which attacks other models than "
                "the substitute; expected for example "
                "attack.inner._target_=robustbench_local.attacks.Momentum"
            )
        if getattr(self.inner, "target", None) is not None:
            raise UserError("attack.inner.target is not served by attack Substitute; type null")

    def require(self, threat: ThreatModel) -> None:
        """As for every attack; the inner one has to fit too, with all access to the substitute."""
        super().require(threat)
        self.inner.require(_against_substitute(threat))

    def check(self, data: "Dataset", threat: ThreatModel) -> None:
        """Raise `UserError` also where there are too few seeds for the classes, or images."""
        super().check(data, threat)
        self._check_seeds(data.num_classes, len(data.validation))
        self.inner.check(data, threat)

    def fit(self, oracle: "Oracle", data: "Split", threat: ThreatModel) -> Self:
        """Train the substitute, on no more than `query_budget` labels from the oracle.

        The result carries what the harness measured with its own, uncharged, access to the victim,
        after the last query and without a way back to the attacker: see `report`. Raises
        `UserError` where there are fewer seeds than classes, or fewer images than seeds.
        """
        self._check_seeds(oracle.num_classes, len(data))
        before = oracle.forward_passes
        with pristine(oracle, seed=derive_seed(self.seed, "substitute")):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "seeds"))
            order = stratified(data.labels.cpu(), generator).to(data.labels.device)
            mine, others = order[: self.seeds], order[self.seeds :][:MEASURED]
            with oracle.allowance(self.query_budget):
                model = self._imitate(oracle, data, mine)
            queries = oracle.forward_passes - before
            done = replace(self, fitted=Fitted(model, {"queries": queries}))
            measured = done._measure(oracle, data.pixels(others), data.labels[others], threat)
        return replace(done, fitted=Fitted(model, {"queries": queries, **measured}))

    def _check_seeds(self, classes: int, images: int) -> None:
        if self.seeds < classes:
            raise UserError(
                f"attack.seeds={self.seeds} is less than the {classes} classes; expected at least "
                f"one image of each: type attack.seeds={classes} or more"
            )
        if self.seeds > images:
            raise UserError(
                f"attack.seeds={self.seeds} is more than the {images} held-out images there are; "
                f"type attack.seeds={images} or less, or raise dataset.validation_fraction"
            )

    def _imitate(self, oracle: "Oracle", data: "Split", rows: Tensor) -> nn.Module:
        """All rounds: label, train, augment."""
        x = data.pixels(rows)
        model = self._build(data.images[rows], oracle).to(x.device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order"))
        labels = predict(oracle, x)
        counts = new_points(
            self.seeds,
            self.rounds,
            doubling_rounds=self.doubling_rounds,
            reservoir=self.reservoir,
            budget=self.query_budget,
        )
        for augmentation, count in enumerate([*counts[1:], 0]):
            train(
                model,
                x,
                labels,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                batch_size=self.batch_size,
                shift=self.shift,
                generator=generator,
            )
            if count > 0:
                chosen = torch.randperm(len(x), generator=generator)[:count].to(x.device)
                step = signed_step(self.augmentation_step, augmentation, self.period)
                more = augment(model, x[chosen], labels[chosen], step)
                x, labels = torch.cat((x, more)), torch.cat((labels, predict(oracle, more)))
        return model.requires_grad_(False)

    def _build(self, seeds: Tensor, oracle: "Oracle") -> Ensemble:
        """A new substitute; torch's global generator is the caller's to put back."""
        classes = oracle.outputs  # rejection is a label like any other
        seed_global(derive_seed(self.seed, "initial"))
        shape = tuple(seeds.shape[1:])
        mean, std = pixel_statistics(seeds)
        networks = [build(input_shape=shape, num_classes=classes) for build in self.models]
        members = (Normalized(n, mean, std, channels=shape[0]) for n in networks)
        return Ensemble(members, abstains=oracle.outputs > oracle.num_classes)

    def _measure(
        self, oracle: "Oracle", x: Images, y: Labels, threat: ThreatModel
    ) -> dict[str, Any]:
        """What the record tells about the substitute; none of it is the attacker's to know."""
        if len(x) == 0 or self.fitted is None:
            return {"held_out_images": 0}
        substitute, victim = self.fitted.model, oracle.victim
        ours, theirs = predict(substitute, x), predict(victim, x)
        right = theirs == y
        facts: dict[str, Any] = {
            "held_out_images": len(x),
            "substitute_accuracy": _share(ours == y),
            "agreement_with_victim": _share(ours == theirs),
            "transfer_epsilon": threat.epsilon,
            "transfer_rate": None,
        }
        if threat.epsilon > 0 and right.any():
            x, y = x[right], y[right]
            x_adv = torch.cat(
                [self.run(victim, x[rows], y[rows], threat) for rows in slices(len(x))]
            )

            def fools(model: Model) -> Tensor:
                answer = predict(model, x_adv)
                return (answer != y) & (answer < oracle.num_classes)  # the last one: rejected

            fooled = fools(substitute)
            if fooled.any():
                facts["transfer_rate"] = _share(fools(victim)[fooled])
        return facts

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Images made on the substitute; `model`, the victim, is not asked."""
        if self.fitted is None:
            raise UserError(
                "attack Substitute has no substitute yet; call fit(oracle, data, threat)"
            )
        return self.inner(self.fitted.model, x, y, _against_substitute(threat))

    def report(self, threat: ThreatModel) -> Mapping[str, Any]:
        """The labels asked for, and what the harness measured on held-out images.

        `substitute_accuracy` by true labels; `agreement_with_victim`; `transfer_rate`: of the
        images that the victim gets right and whose perturbed version, at `transfer_epsilon`, fools
        the substitute, the share that fools the victim as well. None of these images was a seed.
        """
        facts = {} if self.fitted is None else dict(self.fitted.facts)
        return {"seeds": self.seeds, "query_budget": self.query_budget, **facts}


@dataclass(frozen=True)
class Fitted:
    """A trained substitute, in eval mode, and what is known about it, as JSON holds it."""

    model: nn.Module
    facts: Mapping[str, Any]


def _against_substitute(threat: ThreatModel) -> ThreatModel:
    """The same perturbations on the attacker's own model, which it sees through and asks freely."""
    return replace(threat, access="gradients", query_budget=None)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())

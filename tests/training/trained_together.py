"""Trainings that several processes share, and the same alone; no test itself."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from training_data import CPU, make_data

from robustbench_local import processes
from robustbench_local.attacks import PGD
from robustbench_local.defenses import (
    AWP,
    AdversarialTraining,
    FreeAdversarialTraining,
    Mart,
    Recipe,
    Standard,
    Trades,
)
from robustbench_local.errors import UserError
from robustbench_local.models import Normalized
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, Trained, fit
from robustbench_local.training.store import Hold, LeaseLost

# A gradient of nearly 0 weighs as much as any other in AdamW: roundings would show.
SCHEDULE = Schedule(epochs=2, batch_size=24, learning_rate=0.02, optimizer="sgd",
                    augmentation="crop_flip", average_decay=0.9)  # fmt: skip


def network() -> Normalized:
    """Without batch statistics and dropout, and with a weight that plays no part."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    net.register_parameter("unused", nn.Parameter(net[0].bias.detach().clone()))
    return Normalized(net, [0.3], [0.3], channels=1)


@dataclass(frozen=True, kw_only=True)
class Diverging(Standard):
    """The loss is no number, in the second process alone."""

    def loss(self, model, step):
        loss, logits = super().loss(model, step)
        return loss * (float("nan") if processes.number() == 1 else 1.0), logits


@dataclass(frozen=True, kw_only=True)
class Drawing(Standard):
    """Keeps what its steps would draw, from the seed they are given and from torch's generator."""

    drawn: list[list[float]] = field(default_factory=list, compare=False)

    def loss(self, model, step):
        self.drawn.append([float(step.seed), float(torch.rand(()))])
        return super().loss(model, step)


class Perturbing(Drawing):
    """Trains on images that are no longer as they were, such as noisy ones."""

    adversarial = True


class Replaced:
    """The holder of a lease that finds at the end of the second epoch that it was replaced."""

    asked = 0

    def check(self, hold) -> None:
        self.asked += 1
        if self.asked == 2:
            raise LeaseLost


def recipes() -> dict[str, Recipe]:
    threat = ThreatModel(norm="linf", epsilon=0.1)
    attack = PGD(steps=2, step_size=0.5, early_stop=False, best_iterate=False)
    budget = {"threat": threat, "validation": PGD(steps=2), "epsilon_ramp": 0.5}
    adversarial = AdversarialTraining(attack=attack, **budget)
    return {
        "plain": Standard(),
        "adversarial": adversarial,
        "free": FreeAdversarialTraining(replays=2, **budget),
        "trades": Trades(attack=attack, beta=6, **budget),
        "mart": Mart(attack=attack, weight=5, **budget),
        "awp": AWP(gamma=0.01)(adversarial),
    }


def run(cache: Path, recipe: Recipe, **changes: object) -> Trained:
    schedule = replace(SCHEDULE, **changes)
    return fit(network, make_data(), recipe, schedule, seed=3, device=CPU, cache=cache,
               key={"model": "small"})  # fmt: skip


def main() -> None:
    cache = Path(sys.argv[1])
    with processes.together(CPU):
        trained = {name: run(cache, recipe) for name, recipe in recipes().items()}
        again = run(cache, recipes()["plain"])
        drawing = Drawing(), Perturbing()
        for recipe in drawing:
            run(cache, recipe)
        replaced, check = Replaced(), Hold.check
        Hold.check = lambda hold: replaced.check(hold)
        lost = run(cache, recipes()["plain"], epochs=3)
        Hold.check = check
        errors = []
        for recipe, changes in ((Standard(), {"batch_size": 25}), (Diverging(), {})):
            try:
                run(cache, recipe, **changes)
            except UserError as error:
                errors.append(f"{type(error).__name__}: {error}")
    alone = None
    if processes.leads():
        alone = run(cache, Standard(), epochs=1).processes
    print(
        json.dumps(
            {
                "keys": {name: one.key for name, one in trained.items()},
                "sha256": [one.sha256 for one in trained.values()],
                "processes": [one.processes for one in trained.values()],
                "cached": [one.cached for one in trained.values()] + [again.cached],
                "errors": errors,
                "drawn": [recipe.drawn for recipe in drawing],
                "lost": [lost.cached, len(lost.history), lost.sha256],
                "alone": alone,
            }
        )
    )

"""The attack under audit, a little different, and the others it is compared with."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from robustbench_local.attacks import PGD, Attack, Cascade, OnePixel, Square
from robustbench_local.attacks.library import LibraryAttack
from robustbench_local.attacks.minimum_norm import diameter
from robustbench_local.oracle import Oracle, is_settled
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images

LENGTHS = ("steps", "queries", "generations", "max_iter", "nb_iter", "n_iter", "n_queries")
"""Hyper-parameters that say how long an attack goes on, ours and other libraries'."""

REPEATS = ("restarts", "n_restarts", "num_random_init", "samples")
"""Those that say how often, for attacks without steps."""


def fresh(attack: Attack) -> Attack:
    """The same attack with no notes: what it reports is about the evaluation alone."""
    return _changed(attack, lambda part: {})


def longer(attack: Attack, factor: int) -> Attack | None:
    """`factor` times the steps, or queries, or else restarts; None where nothing can be raised."""
    raised = False

    def change(part: Attack) -> dict[str, Any]:
        nonlocal raised
        changes = _multiplied(part, factor)
        raised = raised or bool(changes)
        return changes

    varied = _changed(attack, change)
    return varied if raised else None


def single_draw(attack: Attack) -> Attack:
    """The same attack, averaging a single draw: the same where all draws are alike."""
    return _changed(attack, lambda part: {"eot_samples": 1} if "eot_samples" in _own(part) else {})


def one_step(attack: Attack) -> Attack:
    """The fast gradient sign method, averaging as many draws as the attack does."""
    return PGD(
        steps=1,
        step_size=1.0,
        random_start=False,
        early_stop=False,
        best_iterate=False,
        eot_samples=max(1, attack.draws_averaged),
        seed=attack.seed,
    )


def black_box(attack: Attack, oracle: Oracle, proposals: int) -> tuple[Attack, int]:
    """A search with scores alone that tries so many points, and the forward passes it may ask for.

    Square, and differential evolution under l0. A point costs as many passes as the attack averages
    draws, and under Square twice that of a victim that draws random numbers: it asks about the
    current point again. A query budget of the threat model shortens the search.
    """
    samples, budget = max(1, attack.draws_averaged), oracle.threat.query_budget
    few_pixels = oracle.threat.norm == "l0"
    cost = samples if few_pixels or is_settled(oracle, samples) else 2 * samples
    queries = proposals * cost if budget is None else min(proposals * cost, budget)
    if not few_pixels:
        square = Square(queries=max(queries, samples), eot_samples=samples, seed=attack.seed)
        return square, queries
    looks = queries // samples
    population = max(4, min(100, looks // 10))
    evolution = OnePixel(
        population=population,
        generations=max(1, looks // population),
        eot_samples=samples,
        seed=attack.seed,
    )
    return evolution, queries


def whole_range(threat: ThreatModel, x: Images, share: float) -> ThreatModel:
    """The threat model at a share of the largest perturbation there is."""
    epsilon = share * diameter(threat, x)
    return replace(threat, epsilon=max(1, int(epsilon)) if threat.norm == "l0" else epsilon)


def scaled(threat: ThreatModel, x: Images, factor: float) -> ThreatModel:
    """The threat model at another radius, at most the largest that means something."""
    most = 1.0 if threat.norm in ("linf", "spatial") else diameter(threat, x)
    epsilon = min(most, factor * threat.epsilon)
    return replace(threat, epsilon=max(1, round(epsilon)) if threat.norm == "l0" else epsilon)


def open_to(threat: ThreatModel, attack: Attack) -> ThreatModel:
    """As much access as an attack of the auditor's needs: he is not the adversary."""
    return replace(threat, access=attack.needs, query_budget=None)


def _changed(attack: Attack, change: Callable[[Attack], dict[str, Any]]) -> Attack:
    """A copy with changes, in every part of a cascade where it is one, and without notes."""
    changes = change(attack)
    if isinstance(attack, Cascade):
        parts = {name: _changed(part, change) for name, part in attack.parts.items()}
        return replace(attack, parts=parts, **changes)
    if changes:
        return replace(attack, **changes)
    same = copy.copy(attack)
    object.__setattr__(same, "notes", {})
    return same


def _own(attack: Attack) -> set[str]:
    return {field.name for field in fields(attack) if field.init}


def _multiplied(attack: Attack, factor: int) -> dict[str, Any]:
    if isinstance(attack, Cascade):
        return {}  # its parts are
    if isinstance(attack, LibraryAttack):
        defaults = {name: each.default for name, each in attack.parameters().items()}
        known = {**defaults, **attack.how.paper, **attack.kwargs}
        more = _some(known, LENGTHS, factor) or _some(known, REPEATS, factor)
        more = {name: value for name, value in more.items() if name not in attack.how.fixed}
        return {"kwargs": {**attack.kwargs, **more}} if more else {}
    values = {name: getattr(attack, name) for name in _own(attack)}
    return _some(values, LENGTHS, factor) or _some(values, REPEATS, factor)


def _some(values: Mapping[str, Any], names: Sequence[str], factor: int) -> dict[str, Any]:
    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    return {name: factor * values[name] for name in names if is_count(values.get(name))}

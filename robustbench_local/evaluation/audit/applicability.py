"""Which check applies to which attack, and why not to the others."""

from collections.abc import Sequence
from typing import TypeAlias

from robustbench_local.attacks import APGD, PGD, Attack, Cascade, Noise, Substitute, Transfer
from robustbench_local.evaluation.audit.config import Audit
from robustbench_local.threat import ThreatModel

Reasons: TypeAlias = Sequence[tuple[bool, str]]

_AIMS = "the attack aims at classes, and robust accuracy counts any wrong one"
_SILENT = "the attack asks the victim nothing while it runs"
_RANDOM = "single answers of a victim that draws random numbers prove nothing"


def why_not(
    name: str, attack: Attack, threat: ThreatModel, config: Audit, *, random: bool
) -> str | None:
    """The reason for which a check does not apply to an attack; None where it does."""
    if threat.epsilon == 0:
        return "epsilon is 0, so nothing is attacked"
    reasons = _reasons(name, attack, threat, config, random=random)
    return next((why for applies, why in reasons if applies), None)


def begins_anew(attack: Attack) -> bool:
    """Whether one run follows on the other: restarts, or ascents towards several classes."""
    restarts = getattr(attack, "restarts", 1)  # None: as many as the norm asks for
    return restarts != 1 or getattr(attack, "loss", None) == "dlr_targeted"


def _reasons(
    name: str, attack: Attack, threat: ThreatModel, config: Audit, *, random: bool
) -> Reasons:
    norm = threat.norm
    aims = (getattr(attack, "target", None) is not None, _AIMS)
    silent = (isinstance(attack, Transfer | Substitute), _SILENT)
    blind = (attack.needs != "gradients", f"the attack needs {attack.needs} only")
    no_ball = (norm in ("l0", "spatial"), f"a gradient step is not defined under {norm}")
    nearest = attack.minimum_norm
    steps = getattr(attack, "steps", None)
    reasons: dict[str, Reasons] = {
        "silent_success": [
            (random, _RANDOM),
            aims,
            silent,
            (norm == "spatial", "under spatial it is not known whose image a point is"),
        ],
        "loss_still_falling": [
            (random, _RANDOM),
            blind,
            aims,
            no_ball,
            (nearest, "the attack looks for a small perturbation, not for a high loss"),
            (isinstance(attack, Cascade), "its parts end one after the other; see not_converged"),
            (attack.foreign or not isinstance(steps, int), "its steps are not known"),
            (
                # Of Auto-PGD under l1 most points lie outside the ball, and are nobody's.
                begins_anew(attack) and not isinstance(attack, PGD if norm == "l1" else PGD | APGD),
                "where one of its restarts ends is not known; see not_converged",
            ),
            (
                isinstance(steps, int) and steps <= config.last_steps,
                f"the attack has no more than {config.last_steps} steps; see not_converged",
            ),
        ],
        "not_converged": [],
        "non_monotone_epsilon": [(nearest, "one search of the attack answers for every radius")],
        "unconstrained_failure": [
            silent,
            (attack.needs == "labels", "an attack that sees labels only may find no start"),
            aims,
            (norm == "spatial", "the rotations and translations of spatial are bounded"),
            (
                norm == "l0" and not nearest,
                "a search for few pixels is not made for all of them",
            ),
        ],
        "weaker_than_fgsm": [blind, aims, no_ball],
        "weaker_than_black_box": [
            blind,
            aims,
            (norm == "spatial", "every rotation and translation of the grid is one query"),
        ],
        "noise_as_strong": [(isinstance(attack, Noise), "the attack is noise itself"), aims],
        "frozen_randomness": [(not random, "the victim draws no random numbers"), silent],
    }
    return reasons[name]

"""The attack once more, with every question noted: what it knew, and whether it was finished."""

from typing import NamedTuple

from torch import Tensor

from robustbench_local.attacks import APGD, PGD, Attack
from robustbench_local.evaluation.audit.applicability import begins_anew
from robustbench_local.evaluation.audit.check import Check, count, found
from robustbench_local.evaluation.audit.config import Audit
from robustbench_local.evaluation.audit.trials import Trials
from robustbench_local.evaluation.audit.watch import ORDERS, Watch
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels


class Watched(NamedTuple):
    """The attack on the sample as the evaluation runs it."""

    correct: Tensor  # (N, draws)
    watches: list[tuple[Tensor, Watch]]  # for each batch: the rows, and what was asked about them


def watched(trials: Trials, attack: Attack, *, paths: bool) -> Watched:
    """Run the attack; its questions are noted under the norms that `Watch` knows."""
    if trials.threat.norm not in ORDERS:
        return Watched(trials.run("attack", attack, trials.threat), [])
    watches: list[Watch] = []

    def face(x: Images, y: Labels, threat: ThreatModel) -> Watch:
        oracle = trials.oracle(threat)
        watches.append(Watch.of(oracle, x, y, strays=attack.minimum_norm, paths=paths))
        return watches[-1]

    correct = trials.run("attack", attack, trials.threat, face=face)
    return Watched(correct, list(zip(trials.batches(trials.right), watches, strict=True)))


def silent_success(trials: Trials, base: Watched) -> Check:
    """Whether the attack came across an adversarial image and returned another one.

    The judge looks at these images too: what it does not confirm was rounding.
    """
    lost = asked = 0
    for rows, watch in base.watches:
        asked += watch.forward_passes
        missed = base.correct[rows].all(1) & (watch.worst > 0).cpu()
        if missed.any():
            points = watch.points[missed.to(watch.points.device)]
            lost += int(trials.confirmed(points, rows[missed]).sum())
    why = f"every adversarial image among {count(asked, 'question')} was returned"
    if lost:
        why = (
            f"{count(lost, 'image')} of {len(trials)} counted as robust although the attack had "
            "asked about an adversarial one on its way; it should return the best it found"
        )
    measured = {"lost": lost, "n": len(trials), "queries": asked}
    return found("silent_success", lost > 0, measured, why)


def loss_still_falling(trials: Trials, base: Watched, attack: Attack, config: Audit) -> Check:
    """Indicator 4 of Pintor et al. 2022 (arXiv:2106.09947), mean over what resists.

    The loss is the margin of the true class, which the attack wants to fall. Of an attack that
    begins anew, with restarts or towards one class after the other, it is that of the run which
    came nearest to breaking the image: over all of them the best margin so far would hardly fall.
    """
    last = config.last_steps * max(1, attack.draws_averaged)
    length = questions_of_a_run(attack)
    drops = []
    for rows, watch in base.watches:
        for place in base.correct[rows].all(1).nonzero().squeeze(1).tolist():
            drops.append(last_drop(nearest_run(watch.path(place), length), last))
    mean = sum(drops) / len(drops) if drops else 0.0
    above = sum(drop > config.falling for drop in drops)
    measured = {"mean_drop": mean, "resisting": len(drops), "above_threshold": above}
    if not drops:
        return found("loss_still_falling", False, measured, "no image resists")
    why = (
        f"the last {config.last_steps} steps brought {100 * mean:.1f}% of what the loss of the "
        f"{count(len(drops), 'image')} that resist fell in all"
    )
    raised = mean > config.falling
    why += "; give the attack more steps" if raised else ""
    return found("loss_still_falling", raised, measured, why)


def questions_of_a_run(attack: Attack) -> int | None:
    """How often an attack that begins anew asks about an image in each run; None where it does not.

    Only about images that resist, since the others leave on the way. For attacks of which
    `applicability` says that it is known.
    """
    if not (begins_anew(attack) and isinstance(attack, PGD | APGD)):
        return None
    return (attack.steps + 1) * attack.eot_samples  # and a look at where it ends


def nearest_run(margins: Tensor, length: int | None) -> Tensor:
    """Of whole runs of so many questions, the last one at the end, that of the largest margin."""
    if length is None or len(margins) < length:
        return margins
    runs = margins[len(margins) % length :].view(-1, length)
    return runs[runs.amax(1).argmax()]


def last_drop(margins: Tensor, last: int) -> float:
    """The share of its whole fall that the loss, made monotone, falls over the last queries."""
    if len(margins) <= last + 1:
        return 0.0
    spread = float(margins.max() - margins.min())
    best = margins.cummax(0).values
    return float(best[-1] - best[-1 - last]) / spread if spread > 0 else 0.0

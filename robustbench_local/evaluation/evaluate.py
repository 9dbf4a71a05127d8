"""Attack a victim on a whole test set, batch by batch, and let the judge decide."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from robustbench_local.attacks import Attack
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.evaluation.judge import Verdict, exact, judge
from robustbench_local.evaluation.shards import Shard
from robustbench_local.gradients import is_randomized
from robustbench_local.oracle import Oracle
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import BudgetError, ThreatModel
from robustbench_local.types import Images, Labels, Model


@dataclass(frozen=True)
class PerExample:
    """What happened to each of n test images.

    `clean_correct` and `robust_correct` are fractions of the judge's draws (0 or 1 for a
    deterministic victim), the second of fresh draws on the attacked image. An image that is wrong
    in every clean draw is not attacked and never robust: its size is 0 and its two predictions
    agree.

    Of a victim that may reject images, correct is before the attack what it accepts and gets right,
    and after the attack also what it rejects, of images that it mostly got right before; a rejected
    prediction is K. The arrays on rejection are empty for any other victim, those of single draws
    where there is one draw only, (n, 0).
    """

    indices: NDArray[np.int64]  # position in the source's test set
    labels: NDArray[np.int64]
    clean_correct: NDArray[np.float64]
    robust_correct: NDArray[np.float64]
    clean_prediction: NDArray[np.int64]
    adversarial_prediction: NDArray[np.int64]
    attacked: NDArray[np.bool_]
    size: NDArray[np.float64]  # of the perturbation, under the norm of the threat model
    target: NDArray[np.int64]  # the class a targeted attack wanted; -1: any wrong one
    clean_probabilities: NDArray[np.float16]  # (n, K), softmax, mean over the judge's draws
    adversarial_probabilities: NDArray[np.float16]  # the same after the attack
    clean_rejected: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Fraction of the judge's draws that reject the image."""
    adversarial_rejected: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    clean_suspicion: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """Logit of rejection minus the largest other one, mean over the draws."""
    adversarial_suspicion: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(0, np.float32)
    )
    adversarial_class: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """The likeliest class after the attack, were nothing rejected; not rounded to half precision
    as the probabilities are, in which the two classes of a boundary are equal."""
    clean_draws: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), np.bool_))
    """(n, draws): which draws make up `clean_correct`."""
    robust_draws: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), np.bool_))
    """The same of `robust_correct`."""


@dataclass(frozen=True)
class Outcomes:
    """The outcome of every example and what the evaluation cost.

    Of several radii in one batch the costs are means over those above 0, and of an attack that
    answers all of them with one search each has the costs of that search: `radii_at_once` says how
    many met at once.
    """

    examples: PerExample
    radii_at_once: int
    forward_passes: float  # per attacked image, by the attack
    backward_passes: float
    attack_seconds: float
    judge_seconds: float
    batch_size: int  # the smallest one used, after any lack of memory
    costs: tuple["Cost", ...]  # of each batch, in order
    layout: "Layout"


class Layout(NamedTuple):
    """What the shards of one evaluation have in common, see `shards`."""

    images: int  # of the whole test set
    at_once: int  # attacked together, at all radii
    radii: tuple[float, ...]  # of the evaluation


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How the judge looks: `draws` forward passes per image, seeded by `seed`.

    `reseed` seeds the victim's own generators before each draw. More than one draw makes sense for
    randomised victims only; `randomized` says that it is one. `victim` is who is judged where the
    attack faces somebody else, as one that does not know of a defense does; None: the victim that
    it faces.
    """

    victim: Model | None = None
    draws: int = 1
    seed: int = 0
    reseed: Callable[[int], None] | None = None
    randomized: bool = False

    def restart(self, what: str) -> None:
        """Put the victim's own generators where every run finds them before it does `what`.

        Else what a run did before would decide, and a shard of it does less.
        """
        if self.reseed is not None:
            self.reseed(derive_seed(self.seed, "restart", what))


def evaluate(
    oracle: Oracle,
    attack: Attack,
    split: Split,
    *,
    batch_size: int,
    judging: Judging | None = None,
    progress: Callable[[int, float], None] = lambda done, robust: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Outcomes:
    """Robust accuracy of the oracle's victim on all of `split`, under the oracle's threat model.

    See `evaluate_curve`, of which this is one point.
    """
    return evaluate_curve(
        oracle,
        attack,
        split,
        [oracle.threat.epsilon],
        batch_size=batch_size,
        judging=judging,
        progress=progress,
        say=say,
    )[0]


def evaluate_curve(
    oracle: Oracle,
    attack: Attack,
    split: Split,
    epsilons: Sequence[float],
    *,
    batch_size: int,
    judging: Judging | None = None,
    progress: Callable[[int, float], None] = lambda done, robust: None,
    say: Callable[[str], None] = lambda sentence: None,
    shard: Shard | None = None,
) -> list[Outcomes]:
    """Robust accuracy at each epsilon, otherwise under the oracle's threat model.

    An attack that serves a radius for each example meets all epsilons in one batch, unless the
    victim draws random numbers; one that looks for the smallest perturbation runs once at the
    largest; any other runs once for each.

    Where the device runs out of memory the batch is halved and the work goes on, which `say` is
    told. The draws of our own attacks belong to the example, so their numbers on a deterministic
    victim do not depend on it; those of `foreign` ones belong to the batch.

    `progress` is called with the number of images done since its last call and the robust accuracy
    so far, at the largest epsilon. Raises `BudgetError`, naming the image, where the attack leaves
    its threat model: neither a crash nor a foul of an attack ever counts as robustness. Of a
    `shard` the outcomes are those of its images; `fold` puts the shards together.
    """
    judging = judging or Judging()
    randomized = is_randomized(oracle)
    if randomized and getattr(attack, "target", None) == "least_likely":
        raise UserError(
            "attack.target=least_likely changes with every look at a victim that draws random "
            "numbers; type attack.target=next or attack.target=random"
        )
    threats = [replace(oracle.threat, epsilon=epsilon) for epsilon in epsilons]
    hardest = max(range(len(threats)), key=lambda place: threats[place].epsilon)
    images_of = radii_in_a_batch(attack, epsilons, randomized=randomized)
    layout = Layout(len(split), max(1, batch_size // images_of), tuple(epsilons))
    mine = range(len(split))
    if shard is not None:
        mine = shard.rows(len(split), at_once=layout.at_once, images_of=images_of)
    parts: list[list[PerExample]] = []
    costs: list[list[Cost]] = []
    start, robust = mine.start, 0.0
    while start < mine.stop:
        rows = torch.arange(start, min(start + max(1, batch_size // images_of), mine.stop))
        notes, batch_costs = deepcopy(attack.notes), [Cost() for _ in threats]
        try:
            part = _attack_batch(oracle, attack, threats, split, rows, judging, batch_costs)
        except torch.OutOfMemoryError:  # this batch is attacked again from the start
            attack.notes.clear()
            attack.notes.update(notes)
            batch_size = _halve(batch_size, images_of, say)
            continue
        parts.append(part)
        costs.append(batch_costs)
        start += len(rows)
        robust += float(part[hardest].robust_correct.sum())
        progress(len(rows), robust / (start - mine.start))

    return [
        fold(
            point,
            spent,
            radii_at_once=_radii_at_once(attack, threat, threats, images_of),
            batch_size=batch_size,
            layout=layout,
        )
        for threat, point, spent in zip(
            threats, zip(*parts, strict=True), zip(*costs, strict=True), strict=True
        )
    ]


def fold(
    parts: Sequence[PerExample],
    costs: Sequence["Cost"],
    *,
    radii_at_once: int,
    batch_size: int,
    layout: Layout,
) -> Outcomes:
    """The outcomes of one evaluation from those of its batches, or of its shards, in order.

    `costs` are those of every batch: sums are rounded alike however the batches were dealt out.
    """
    examples = PerExample(
        *(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(PerExample))
    )
    cost, attacked = sum(costs, Cost()), max(1, int(examples.attacked.sum()))
    return Outcomes(
        examples,
        radii_at_once=radii_at_once,
        forward_passes=cost.forward / attacked,
        backward_passes=cost.backward / attacked,
        attack_seconds=cost.attack_seconds,
        judge_seconds=cost.judge_seconds,
        batch_size=batch_size,
        costs=tuple(costs),
        layout=layout,
    )


def radii_in_a_batch(attack: Attack, epsilons: Sequence[float], *, randomized: bool) -> int:
    """How often each image is in a batch: once for each radius that is attacked together.

    Sharing a batch would change the draws that each radius of a random victim meets.
    """
    shares = attack.per_example_radius and not attack.minimum_norm and not randomized
    return max(1, sum(epsilon > 0 for epsilon in epsilons)) if shares else 1


def _radii_at_once(
    attack: Attack, threat: ThreatModel, threats: Sequence[ThreatModel], images_of: int
) -> int:
    if attack.minimum_norm:
        return len(threats)
    return images_of if threat.epsilon > 0 else 1


def _attack_batch(
    oracle: Oracle,
    attack: Attack,
    threats: Sequence[ThreatModel],
    split: Split,
    rows: torch.Tensor,
    judging: Judging,
    costs: Sequence["Cost"],
) -> list[PerExample]:
    """Judge, attack what is correct, judge again; one result and cost for each threat model."""
    on_device = rows.to(split.labels.device)
    x, y = split.pixels(on_device), split.labels[on_device]
    began = now(x.device)
    clean = _verdict(oracle, threats[0], x, x, y, judging, "clean", rows)
    attacked = clean.correct.any(1)
    with exact():
        wanted, targeted = attack.goal(oracle.victim, x, y)
    looking = now(x.device) - began

    chosen = attacked.to(x.device)
    found = [x[chosen]] * len(threats)
    if attacked.any():  # not every model takes an empty batch

        def reseed() -> None:
            if judging.reseed is not None:
                judging.reseed(derive_seed(judging.seed, "attack", int(rows[0])))

        with exact():
            job = _Job(oracle, attack, threats, x[chosen], y[chosen], costs)
            found = _find(job, reseed)

    results = []
    for threat, x_adv, cost in zip(threats, found, costs, strict=True):
        began = now(x.device)
        after = clean
        if attacked.any():
            try:
                fooled = _verdict(
                    oracle, threat, x_adv, x[chosen], y[chosen], judging, "attacked", rows
                )
            except BudgetError as error:
                raise _renumbered(error, split.indices[rows][attacked]) from None
            after = clean.updated(attacked, fooled)
        survived = after.robust(clean)
        asked = len(clean.suspicion)  # 0 where the victim cannot reject
        several = judging.draws if judging.draws > 1 else 0
        result = PerExample(
            indices=split.indices[rows].numpy(),
            labels=y.cpu().numpy(),
            clean_correct=clean.correct.double().mean(1).numpy(),
            robust_correct=survived.double().mean(1).numpy(),
            clean_prediction=clean.prediction.numpy(),
            adversarial_prediction=after.prediction.numpy(),
            attacked=attacked.numpy(),
            size=after.size.numpy(),
            target=(wanted if targeted else torch.full_like(wanted, -1)).cpu().numpy(),
            clean_probabilities=clean.probabilities.half().numpy(),
            adversarial_probabilities=after.probabilities.half().numpy(),
            clean_rejected=clean.rejected[:asked].double().mean(1).numpy(),
            adversarial_rejected=after.rejected[:asked].double().mean(1).numpy(),
            clean_suspicion=clean.suspicion.numpy(),
            adversarial_suspicion=after.suspicion.numpy(),
            adversarial_class=after.likeliest[:asked].numpy(),
            clean_draws=clean.correct[:, :several].numpy(),
            robust_draws=survived[:, :several].numpy(),
        )
        cost.judge_seconds += now(x.device) - began + looking / len(threats)
        results.append(result)
    return results


class _Job(NamedTuple):
    """The images of a batch that are to be attacked, under which threats, at whose cost."""

    oracle: Oracle
    attack: Attack
    threats: Sequence[ThreatModel]
    x: Images
    y: Labels
    costs: Sequence["Cost"]


def _find(job: _Job, reseed: Callable[[], None]) -> list[Images]:
    """What the attack makes of the images under each threat model, and what each has cost.

    `reseed` puts the victim's own generators where a run of one radius finds them.
    """
    oracle, attack, threats, x, y, costs = job
    reseed()
    if len(threats) > 1 and attack.minimum_norm:
        oracle.begin(len(x))
        largest = max(threats, key=lambda threat: threat.epsilon)
        with _counted(oracle, x, costs, shares=1):
            nearest = attack(oracle, x, y, largest)
        sizes = largest.size(nearest, x)
        inside = [(sizes <= threat.epsilon).view(-1, 1, 1, 1) for threat in threats]
        return [torch.where(mask, nearest, x) for mask in inside]
    if len(threats) > 1 and attack.per_example_radius and not is_randomized(oracle):
        return _find_at_once(job)
    found = []
    for threat, cost in zip(threats, costs, strict=True):
        oracle.begin(len(x))
        reseed()
        with _counted(oracle, x, [cost], shares=1):
            found.append(attack(oracle, x, y, threat))
    return found


def _find_at_once(job: _Job) -> list[Images]:
    """All radii above 0 in one batch, each image once for each of them."""
    oracle, attack, threats, x, y, costs = job
    found = [x.clone() for _ in threats]
    some = [place for place, threat in enumerate(threats) if threat.epsilon > 0]
    if some:
        radii = torch.tensor([threats[place].epsilon for place in some], dtype=torch.float64)
        each = radii.repeat_interleave(len(x)).to(x.device)
        oracle.begin(len(each))
        with _counted(oracle, x, [costs[place] for place in some], shares=len(some)):
            many = attack(
                oracle,
                x.repeat(len(some), 1, 1, 1),
                y.repeat(len(some)),
                oracle.threat.per_example(each),
            )
        for place, part in zip(some, many.view(len(some), *x.shape), strict=True):
            found[place] = part
    return found


@dataclass
class Cost:
    """What one radius has cost, in one batch or over several."""

    forward: float = 0.0
    backward: float = 0.0
    attack_seconds: float = 0.0
    judge_seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)),
        )


@contextmanager
def _counted(oracle: Oracle, x: Images, costs: Sequence[Cost], *, shares: int) -> Iterator[None]:
    """Add what the body asks of the oracle, and its time, to each cost: one of `shares`."""
    forward, backward, began = oracle.forward_passes, oracle.backward_passes, now(x.device)
    yield
    seconds = now(x.device) - began
    for cost in costs:
        cost.forward += (oracle.forward_passes - forward) / shares
        cost.backward += (oracle.backward_passes - backward) / shares
        cost.attack_seconds += seconds / shares


def _verdict(
    oracle: Oracle,
    threat: ThreatModel,
    x_adv: Images,
    x: Images,
    y: Labels,
    judging: Judging,
    look: str,
    rows: torch.Tensor,
) -> Verdict:
    """Each look at each batch draws afresh: shared noise would pair clean and attacked images."""
    return judge(
        judging.victim or oracle.victim,
        x_adv,
        x,
        y,
        threat,
        num_classes=oracle.num_classes,
        draws=judging.draws,
        seed=derive_seed(judging.seed, look, int(rows[0])),
        reseed=judging.reseed,
    )


def _renumbered(error: BudgetError, indices: torch.Tensor) -> BudgetError:
    """The same foul, with the image's position in the test set instead of in the batch."""
    if error.image is None:
        return error
    return BudgetError(error.reason, image=int(indices[error.image]))


def _halve(batch_size: int, images_of: int, say: Callable[[str], None]) -> int:
    if batch_size <= images_of:
        each = "" if images_of == 1 else f" at {images_of} radii"
        fewer = "" if images_of == 1 else " give threat.epsilon fewer radii,"
        raise UserError(
            f"one image alone{each} does not fit into the memory of the device;{fewer} type "
            "device=cpu or choose a smaller model"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    smaller = max(images_of, batch_size // 2)
    say(f"out of memory: the evaluation goes on with batches of {smaller} images")
    return smaller


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

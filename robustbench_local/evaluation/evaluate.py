"""Attack a victim on a whole test set, batch by batch, and let the judge decide."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from robustbench_local.attacks import Attack
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.evaluation.judge import Verdict, exact, judge
from robustbench_local.evaluation.oracle import Oracle
from robustbench_local.randomness import derive_seed
from robustbench_local.threat import BudgetError
from robustbench_local.types import Images, Labels


@dataclass(frozen=True)
class PerExample:
    """What happened to each of n test images.

    `clean_correct` and `robust_correct` are fractions of the judge's draws (0 or 1 for a
    deterministic victim), the second those correct before *and* after the attack. Images wrong
    from the start are not attacked: their size is 0 and their two predictions agree.
    """

    indices: NDArray[np.int64]  # position in the source's test set
    labels: NDArray[np.int64]
    clean_correct: NDArray[np.float64]
    robust_correct: NDArray[np.float64]
    clean_prediction: NDArray[np.int64]
    adversarial_prediction: NDArray[np.int64]
    attacked: NDArray[np.bool_]
    size: NDArray[np.float64]  # of the perturbation, under the norm of the threat model


@dataclass(frozen=True)
class Outcomes:
    """The outcome of every example and what the evaluation cost."""

    examples: PerExample
    forward_passes: float  # per attacked image, by the attack
    backward_passes: float
    attack_seconds: float
    judge_seconds: float
    batch_size: int  # the smallest one used, after any lack of memory


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How the judge looks: `draws` forward passes per image, seeded by `seed`.

    `reseed` seeds the victim's own generators before each draw. More than one draw makes sense for
    randomised victims only.
    """

    draws: int = 1
    seed: int = 0
    reseed: Callable[[int], None] | None = None


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

    Where the device runs out of memory the batch is halved and the work goes on, which `say` is
    told; the attack's draws belong to the example, so the numbers of a deterministic victim do not
    depend on it. `progress` is
    called with the number of images done since its last call and the robust accuracy so far.
    Raises `BudgetError`, naming the image, where the attack leaves its threat model: neither a
    crash nor a foul of an attack ever counts as robustness.
    """
    judging = judging or Judging()
    parts: list[PerExample] = []
    clock = {"attack": 0.0, "judge": 0.0}
    start, robust = 0, 0.0
    while start < len(split):
        rows = torch.arange(start, min(start + batch_size, len(split)))
        spent = oracle.forward_passes, oracle.backward_passes
        try:
            part = _attack_batch(oracle, attack, split, rows, judging, clock)
        except torch.OutOfMemoryError:
            oracle.forward_passes, oracle.backward_passes = spent
            batch_size = _halve(batch_size, say)
            continue
        parts.append(part)
        start += len(rows)
        robust += float(part.robust_correct.sum())
        progress(len(rows), robust / start)

    examples = PerExample(
        *(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(PerExample))
    )
    attacked = max(1, int(examples.attacked.sum()))
    return Outcomes(
        examples,
        forward_passes=oracle.forward_passes / attacked,
        backward_passes=oracle.backward_passes / attacked,
        attack_seconds=clock["attack"],
        judge_seconds=clock["judge"],
        batch_size=batch_size,
    )


def _attack_batch(
    oracle: Oracle,
    attack: Attack,
    split: Split,
    rows: torch.Tensor,
    judging: Judging,
    clock: dict[str, float],
) -> PerExample:
    """Judge, attack what is correct, judge again."""
    on_device = rows.to(split.labels.device)
    x, y = split.pixels(on_device), split.labels[on_device]
    began = _now(x)
    clean = _verdict(oracle, x, x, y, judging, "clean", rows)
    attacked = clean.correct.any(1)
    after_clean = _now(x)

    correct, prediction, size = clean.correct.clone(), clean.prediction.clone(), clean.size.clone()
    after_attack = after_clean
    if attacked.any():  # not every model takes an empty batch
        chosen = attacked.to(x.device)
        if judging.reseed is not None:
            judging.reseed(derive_seed(judging.seed, "attack", int(rows[0])))
        oracle.begin(int(chosen.sum()))
        with exact():
            found = attack(oracle, x[chosen], y[chosen], oracle.threat)
        after_attack = _now(x)
        try:
            fooled = _verdict(oracle, found, x[chosen], y[chosen], judging, "attacked", rows)
        except BudgetError as error:
            raise _renumbered(error, split.indices[rows][attacked]) from None
        correct[attacked] &= fooled.correct
        prediction[attacked] = fooled.prediction
        size[attacked] = fooled.size
    clock["attack"] += after_attack - after_clean
    clock["judge"] += after_clean - began + _now(x) - after_attack
    return PerExample(
        indices=split.indices[rows].numpy(),
        labels=y.cpu().numpy(),
        clean_correct=clean.correct.double().mean(1).numpy(),
        robust_correct=correct.double().mean(1).numpy(),
        clean_prediction=clean.prediction.numpy(),
        adversarial_prediction=prediction.numpy(),
        attacked=attacked.numpy(),
        size=size.numpy(),
    )


def _verdict(
    oracle: Oracle,
    x_adv: Images,
    x: Images,
    y: Labels,
    judging: Judging,
    look: str,
    rows: torch.Tensor,
) -> Verdict:
    """Each look at each batch draws afresh: shared noise would pair clean and attacked images."""
    return judge(
        oracle.victim,
        x_adv,
        x,
        y,
        oracle.threat,
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


def _halve(batch_size: int, say: Callable[[str], None]) -> int:
    if batch_size == 1:
        raise UserError(
            "one image alone does not fit into the memory of the device; type device=cpu or "
            "choose a smaller model"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"out of memory: the evaluation goes on with batches of {batch_size // 2} images")
    return batch_size // 2


def _now(x: Images) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()

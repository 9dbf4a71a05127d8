"""The judge: what an attack returned is believed only after looking again.

An exact forward pass through the whole deployed pipeline (float32, no TF32, eval mode), with fresh
random draws the attack never saw, and the budget and the box checked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from robustbench_local.errors import UserError
from robustbench_local.gradients import deterministic, pristine, seed_global
from robustbench_local.oracle import check_logits
from robustbench_local.randomness import derive_seed
from robustbench_local.rejection import abstains
from robustbench_local.threat import ThreatModel, check_box
from robustbench_local.types import Images, Labels, Model

VERSION = 2
"""Raised whenever a judgement could come out differently; part of the comparability key."""


@dataclass(frozen=True)
class Verdict:
    """How the victim classified a batch of images; all of shape (N,), on the CPU.

    A victim that cannot reject an image rejects none; its `suspicion` is empty, (0,).
    """

    correct: Tensor  # (N, draws) bool: accepted and right
    rejected: Tensor  # (N, draws) bool
    prediction: Tensor  # int64, of the first draw; K: rejected
    probabilities: Tensor  # (N, K) float32: the softmax of the classes' logits, mean over the draws
    likeliest: Tensor  # int64: the class with the largest of these, before they are rounded
    suspicion: Tensor  # float32: logit of rejection minus the largest other, mean over the draws
    size: Tensor  # float64, under the norm of the threat model

    @property
    def resists(self) -> Tensor:
        """Which draws withstand an attack, (N, draws) bool: right, or rejected."""
        return self.correct | self.rejected

    def robust(self, clean: "Verdict") -> Tensor:
        """Which draws withstand an attack on images that were judged `clean` before, (N, draws).

        Those that are right, and those that reject an image which most draws accepted and got
        right before: rejecting an attacked image is as good as being right, rejecting a clean one
        is an error.
        """
        mostly = 2 * clean.correct.sum(1, keepdim=True) > clean.correct.shape[1]
        return self.correct | (self.rejected & mostly)

    def updated(self, rows: Tensor, other: "Verdict") -> "Verdict":
        """The same with what `other` says of the images in `rows`, a mask of shape (N,)."""
        columns = []
        for part in fields(self):
            values = getattr(self, part.name).clone()
            if len(values):
                values[rows] = getattr(other, part.name)
            columns.append(values)
        return Verdict(*columns)


@contextmanager
def exact() -> Iterator[None]:
    """Full float32 precision and deterministic kernels; then as before.

    Attacks run in it too: a point that is misclassified under TF32 only would leave the attack and
    be called robust by the judge.
    """
    cudnn = torch.backends.cudnn
    precision = torch.get_float32_matmul_precision()
    allowed = cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        with deterministic():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = allowed


def judge(
    victim: Model,
    x_adv: Images,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    *,
    num_classes: int,
    draws: int = 1,
    seed: int = 0,
    reseed: Callable[[int], None] | None = None,
) -> Verdict:
    """Classify `x_adv`, which must lie in the threat model around `x`.

    `draws` forward passes, each after `reseed` (which seeds the victim's own generators) with a
    seed derived from `seed`; more than one makes sense for randomised victims only. Raises
    `BudgetError` for an image outside the threat model, `UserError` for images outside [0, 1] and
    for a victim that returns the wrong shape or NaN.
    """
    check_images(x, y, num_classes)
    threat.check(x_adv, x)
    rejects = abstains(victim)
    answers = []
    # In float64, since points on a boundary differ by less than float32 can tell.
    probabilities = torch.zeros(len(x), num_classes, dtype=torch.float64)
    suspicion = torch.zeros(len(x) if rejects else 0)
    with exact(), pristine(victim), torch.no_grad():
        for draw in range(draws):
            draw_seed = derive_seed(seed, "judge", draw)
            seed_global(draw_seed)
            if reseed is not None:
                reseed(draw_seed)
            logits = check_logits(victim(x_adv.float()), x, num_classes + rejects)
            classes = logits[:, :num_classes]
            probabilities += classes.double().softmax(1).cpu() / draws
            if rejects:
                suspicion += (logits[:, num_classes] - classes.amax(1)).cpu() / draws
            answers.append(logits.argmax(1))
    answered = torch.stack(answers, 1)
    return Verdict(
        correct=(answered == y[:, None]).cpu(),
        rejected=(answered == num_classes).cpu(),
        prediction=answers[0].cpu(),
        probabilities=probabilities.float(),
        likeliest=probabilities.argmax(1),
        suspicion=suspicion,
        size=threat.size(x_adv, x).cpu(),
    )


def check_images(x: Images, y: Labels, num_classes: int) -> None:
    """Raise `UserError` for pixels outside [0, 1] or NaN, and for labels out of range."""
    if len(x) == 0:
        return
    check_box(x)
    if int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise UserError(
            f"labels run from {int(y.min())} to {int(y.max())}; expected 0 to {num_classes - 1}"
        )

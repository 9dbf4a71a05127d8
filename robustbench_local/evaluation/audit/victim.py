"""The checks that only look at the victim, at the data and at what was attacked.

Sources: Carlini et al. 2019 (arXiv:1902.06705), Croce and Hein 2020 (arXiv:2003.01690, the checks
of their code), Pintor et al. 2022 (arXiv:2106.09947).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from robustbench_local.attacks import Attack, AutoAttack, Transfer
from robustbench_local.data import Dataset
from robustbench_local.evaluation.audit.check import Check, attempted, count, found, skipped
from robustbench_local.evaluation.audit.config import Audit
from robustbench_local.evaluation.audit.switch import gradient_switch
from robustbench_local.gradients import attack_loss, pristine
from robustbench_local.rejection import folded
from robustbench_local.types import Images, Labels, Logits, Model


def audit_victim(
    victim: Model,
    data: Dataset,
    attack: Attack,
    *,
    config: Audit,
    awareness: str = "adaptive",
    faced_is_random: bool = True,
    at_most: int | None = None,
) -> list[Check]:
    """Everything that can be said before the attack has run, on `at_most` images.

    Where the device has no memory for as many, on as many as it has. A check that breaks down is
    skipped with what the exception said. `faced_is_random` says whether what the attack faces may
    draw random numbers: the bare network of an oblivious attack seldom does.
    """
    x, y = _first(data, config, at_most)
    looks = _fitting(lambda x, y: look_often(victim, x, y, passes=config.passes), x, y)
    switch = partial(_fitting, lambda x, y: gradient_switch(victim, x, spread=config.spread), x, y)
    zero = partial(_fitting, lambda x, y: zero_gradient(victim, x, y, attack), x, y)
    return [
        _oblivious(awareness),
        _subset(data, config),
        _randomized(looks, attack, config, faced=faced_is_random),
        attempted("gradient_switch", switch),
        _softmax_output(looks.outputs[0, :, : data.num_classes], config),
        attempted("zero_gradient", zero),
    ]


def is_random(
    victim: Model, data: Dataset, *, config: Audit | None = None, at_most: int | None = None
) -> bool:
    """Whether forward passes of the same images differ, declared or not."""
    config = config or Audit()
    x, y = _first(data, config, at_most)
    looks = _fitting(lambda x, y: look_often(victim, x, y, passes=config.passes), x, y)
    return looks.differ(config.spread)


_Seen = TypeVar("_Seen")


def _fitting(look: Callable[[Images, Labels], _Seen], x: Images, y: Labels) -> _Seen:
    """A look at the images, at half of them where the device runs out of memory, and so on."""
    while True:
        try:
            return look(x, y)
        except torch.OutOfMemoryError:
            if len(x) == 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        x, y = x[: len(x) // 2], y[: len(y) // 2]


def _first(data: Dataset, config: Audit, at_most: int | None) -> tuple[Images, Labels]:
    rows = slice(0, config.images if at_most is None else min(config.images, at_most))
    return data.test.pixels(rows), data.test.labels[rows]


class Looks(NamedTuple):
    """Several passes of the same images."""

    outputs: Tensor  # (passes, N, K)
    spread: float  # largest distance between two passes, see `largest_distance`
    counts: list[int]  # images right, in each pass

    def differ(self, spread: float) -> bool:
        """Random is whatever changes logits or a prediction."""
        return self.spread > spread or min(self.counts) != max(self.counts)


def look_often(victim: Model, x: Images, y: Labels, *, passes: int) -> Looks:
    """Several passes of the same images, the global generators seeded before the first."""
    with pristine(victim, seed=0), torch.no_grad():
        outputs = torch.stack([victim(x) for _ in range(passes)])
    counts = (outputs.argmax(2) == y).sum(1).tolist()
    return Looks(outputs, largest_distance(outputs), counts)


def largest_distance(outputs: Tensor) -> float:
    """Largest L2 distance between normalised logits of the same image, over pairs of passes."""
    unit = functional.normalize(outputs.double(), dim=2)
    return max(float((unit - one).norm(dim=2).max()) for one in unit)


def _oblivious(awareness: str) -> Check:
    ignored = awareness == "oblivious"
    why = "the attack ignored the defense" if ignored else "the attack faced the defended model"
    return found("oblivious", ignored, {}, why)


def _subset(data: Dataset, config: Audit) -> Check:
    n, total = len(data.test), data.test_total
    few = n < config.smallest_test or n < total or data.source == "embedded"
    part = f"{n} of {total}" if n < total else f"all {n}"
    why = f"measured on {part} test images of {data.name}"
    return found("subset", few, {"n": n, "test_total": total}, why)


def _randomized(looks: Looks, attack: Attack, config: Audit, *, faced: bool) -> Check:
    samples = attack.draws_averaged
    measured = {
        "spread": looks.spread,
        "passes": len(looks.counts),
        "fewest_correct": min(looks.counts),
        "most_correct": max(looks.counts),
        "samples_averaged": samples,
    }
    differs = f"{config.passes} forward passes differ by up to {looks.spread:.2g}"
    if not looks.differ(config.spread):
        return found("randomized", False, measured, f"{config.passes} forward passes agree")
    if isinstance(attack, Transfer):
        return skipped("randomized", f"{differs}, but the attack asks the victim nothing")
    if not faced:
        why = f"{differs}, but what draws is in the defense, which the attack does not face"
        return found("randomized", False, measured, why)
    if samples > 1:
        why = f"{differs}; the attack averaged {samples} of them"
        return found("randomized", False, measured, why)
    cure = "attack.eot_samples=20"
    if not hasattr(attack, "eot_samples"):
        cure = "attack=standard where the threat model allows it"
    why = f"{differs} and the attack used one sample of them; type {cure}"
    return found("randomized", True, measured, why)


def _softmax_output(logits: Logits, config: Audit) -> Check:
    excess = float((logits.sum(1) - 1).abs().max())
    least, most = float(logits.min()), float(logits.max())
    slack = config.softmax_tolerance
    probabilities = excess < slack and least > -slack and most < 1 + slack
    why = "the model returns logits"
    if probabilities:
        why = "the model returns probabilities; logits give attacks better gradients"
    measured = {"sum_minus_one": excess, "smallest": least, "largest": most}
    return found("softmax_output", probabilities, measured, why)


def zero_gradient(victim: Model, x: Images, y: Labels, attack: Attack) -> Check:
    """Whether a gradient attack finds anything to climb where it starts.

    Looked at are the images that are right, since no others are attacked. The margin is the most
    forgiving loss: where its gradient is exactly zero, that of any loss is. Plain cross-entropy
    loses its own far earlier, when float32 cannot hold the other classes' probabilities (logits
    about 90 to 104 apart); our attacks climb its log-odds form and do not notice, but attacks of
    other libraries stand still.
    """
    name = "zero_gradient"
    if attack.needs != "gradients":
        return skipped(name, f"the attack needs {attack.needs} only")
    starts = _starting_gradients(victim, x, y)
    if starts.attacked == 0:
        return skipped(name, f"none of {count(len(x), 'image')} is classified correctly")
    measured = {"attacked": starts.attacked, "zero": starts.zero, "zero_plain": starts.plain}
    of = f"of {count(starts.attacked, 'image')}"
    if starts.zero:
        why = (
            f"{starts.zero} {of} have an input gradient of exactly zero, so gradient attacks "
            "cannot move them; give the part without a gradient a surrogate (BPDA)"
        )
        return found(name, True, measured, why)
    if starts.plain:
        climbs = attack.foreign and not isinstance(attack, AutoAttack)
        why = (
            f"{starts.plain} {of} have no gradient of plain cross-entropy, since the softmax "
            "saturates (as with a temperature); "
        )
        why += "the attack may climb it: choose one of the margin" if climbs else (
            "the attack climbs a loss that keeps its gradient"
        )  # fmt: skip
        return found(name, True, measured, why, severe=climbs)
    return found(name, False, measured, f"none {of} has an input gradient of zero")


class _Starts(NamedTuple):
    attacked: int  # images that are right
    zero: int  # of these, without any gradient of the margin
    plain: int  # without any of plain cross-entropy


def _starting_gradients(victim: Model, x: Images, y: Labels) -> _Starts:
    attacked = zero = plain = 0
    with pristine(victim, seed=0), torch.enable_grad():
        for rows in torch.split(torch.arange(len(x), device=x.device), _AT_ONCE):
            part, labels = x[rows].detach().requires_grad_(), y[rows]
            logits = victim(part)
            right = logits.detach().argmax(1) == labels
            attacked += int(right.sum())
            margin = attack_loss(logits, labels, "margin")
            zero += int((right & _is_flat(margin, part)).sum())
            resisting = folded(logits, labels, sum_odds=True)
            entropy = functional.cross_entropy(resisting, labels, reduction="none")
            plain += int((right & _is_flat(entropy, part)).sum())
    return _Starts(attacked, zero, plain)


_AT_ONCE = 64
"""Images of which a graph is held."""


def _is_flat(loss: Tensor, x: Images) -> Tensor:
    """Whether each image has a gradient of exactly zero, or no graph leads to it at all."""
    flat = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if not loss.requires_grad:
        return flat
    (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=True, allow_unused=True)
    if gradient is None:
        return flat
    # Not `== 0`, which NaN is not either: the attack itself will tell of it.
    result: Tensor = (gradient.flatten(1) == 0).all(1)
    return result

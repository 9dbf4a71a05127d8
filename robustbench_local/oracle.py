"""What the attacker may see of the victim, and what it costs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_local.errors import UserError
from robustbench_local.gradients import is_randomized, suitable_parts
from robustbench_local.rejection import abstains
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Logits, Model


class QueryBudgetError(UserError):
    """An attack asked for more forward passes than it was granted."""


class Oracle(nn.Module):
    """The victim behind a counter, with no more access than the threat model grants.

    Under `gradients` its output carries a graph; under `scores` it is cut off; under `labels` it
    is the one-hot vector of the predicted class. `outputs` is the number of entries, that of the
    classes and one more where the victim may reject images. `forward_passes` and `backward_passes`
    count images; `randomized` tells attacks whether the victim was seen to draw random numbers,
    `None` that nobody looked. Raises `QueryBudgetError` when the budget of the examples announced
    with `begin`, or the `allowance`, is spent, and `UserError` where the victim returns a wrong
    shape or numbers that are not finite.
    """

    def __init__(
        self,
        victim: Model,
        threat: ThreatModel,
        num_classes: int,
        *,
        randomized: bool | None = None,
    ) -> None:
        super().__init__()
        self.randomized = randomized
        self.victim = victim
        self.threat = threat
        self.num_classes = num_classes
        self.outputs = num_classes + abstains(victim)
        self.forward_passes = 0
        self.backward_passes = 0
        self._spent = torch.zeros(0, dtype=torch.int64)  # of each example announced
        self._allowed: int | None = None

    @property
    def whole_batches(self) -> bool:
        """Whether batches stay in one piece, since each call is charged to all examples."""
        return self.threat.query_budget is not None

    def begin(self, examples: int) -> None:
        """A new batch of this many examples, each with its whole budget."""
        self._spent = torch.zeros(examples, dtype=torch.int64)

    @contextmanager
    def allowance(self, queries: int) -> Iterator[None]:
        """Grant the body so many forward passes in all, whichever images they are about."""
        self._allowed = queries
        try:
            yield
        finally:
            self._allowed = None

    def forward(self, x: Images, owners: Tensor | None = None) -> Logits:
        """Ask about a batch of images; see the class.

        `owners` says which of the examples announced each image is about, shape (N,).
        """
        self._charge(len(x), owners)
        if self.threat.access == "gradients":
            logits = check_logits(self.victim(x), x, self.outputs)
            if logits.requires_grad:
                logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
            return logits
        with torch.no_grad():
            logits = check_logits(self.victim(x.detach()), x, self.outputs)
        if self.threat.access == "scores":
            return logits
        return functional.one_hot(logits.argmax(1), self.outputs).to(logits.dtype)

    def _charge(self, images: int, owners: Tensor | None) -> None:
        if self._allowed is not None:
            self._allowed -= images
            if self._allowed < 0:
                raise QueryBudgetError(
                    f"the attack asked {-self._allowed} queries more than attack.query_budget "
                    "grants; raise attack.query_budget or give the attack fewer seeds or rounds"
                )
        self.forward_passes += images
        budget, examples = self.threat.query_budget, len(self._spent)
        if budget is None or examples == 0:
            return
        if owners is not None:
            self._spent += torch.bincount(owners.cpu(), minlength=examples)
        else:
            # A call with no more images than examples asks at most once about each of them; a
            # larger one asks several times, spread evenly.
            self._spent += -(-images // examples)
        if int(self._spent.max()) > budget:
            raise QueryBudgetError(
                f"the attack asked for forward pass {int(self._spent.max())} of an example but "
                f"threat.query_budget={budget}; give the attack fewer steps, restarts or queries, "
                "or raise threat.query_budget"
            )

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_passes += len(gradient)


def is_settled(model: Model, samples: int) -> bool:
    """Whether one look at the model proves what it answers.

    Without an `Oracle` that was told, a model counts as random where it says so and where the user
    wants `samples` looks averaged.
    """
    looked = isinstance(model, Oracle) and model.randomized is not None
    return not is_randomized(model) and (samples == 1 or looked)


def ask(model: Model, x: Images, owners: Tensor) -> Logits:
    """The model's answer, charged to the right examples where the model counts; see `Oracle`."""

    def answer(rows: slice) -> Logits:
        logits: Logits = (
            model(x[rows], owners[rows]) if isinstance(model, Oracle) else model(x[rows])
        )
        return logits

    parts = [answer(rows) for rows in suitable_parts(model, x)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_logits(logits: Tensor, x: Images, outputs: int) -> Logits:
    """Return the logits, or raise `UserError` for a wrong type or shape, NaN or infinity."""
    expected = (len(x), outputs)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"the model returned {came} for images of shape {tuple(x.shape)}; expected logits of "
            f"shape {expected}: check model._target_ and its last layer"
        )
    if not torch.isfinite(logits).all():
        image = int((~torch.isfinite(logits)).any(1).nonzero()[0, 0])
        raise UserError(
            f"the model returned NaN or infinity for image {image} of a batch; expected finite "
            "logits: check its weights (model.checkpoint) and its normalisation (model.std)"
        )
    return logits

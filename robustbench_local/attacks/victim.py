"""The victim as another library meets it."""

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from robustbench_local.gradients import resists
from robustbench_local.oracle import ask
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels, Model

Form: TypeAlias = Literal["logits", "positive", "probabilities"]
"""Logits as they are, shifted for each image so that none is negative, or after a softmax."""


class SpentError(Exception):
    """The query budget of the image is used up; the search ends here."""


ROUNDING = 1e-5
"""Relative excess over epsilon that counts as their rounding and is projected away; see `mend`."""


class Budget(NamedTuple):
    """Which example of the batch is attacked, and how many queries it has (None: any number)."""

    owner: int
    queries: int | None


class Victim(nn.Module):
    """Casts what it is asked about to the images' own type, and answers in the `form` wanted.

    Under a `budget` it charges every query to its owner and raises `SpentError` before one too
    many. If it is to `watch`, `smallest` is the least perturbation asked about that reached the
    goal. `error` is the exception that the model raised, if any: libraries may wrap it.
    """

    def __init__(
        self,
        model: Model,
        classes: int,
        x: Images,
        y: Labels,
        threat: ThreatModel,
        *,
        targeted: bool,
        form: Form,
        budget: Budget | None,
        watch: bool,
    ) -> None:
        super().__init__()
        # First in line: libraries take the device of the first parameter.
        self.device_of_images = nn.Parameter(x.new_zeros(0), requires_grad=False)
        self.model = model
        self.classes = classes
        self.error: Exception | None = None
        self.smallest: Images | None = None
        self._like, self._y, self._threat = x, y, threat
        self._targeted, self._form, self._watch = targeted, form, watch
        self._owner = None if budget is None else budget.owner
        self._left = None if budget is None else budget.queries
        self._least = float("inf")
        self.eval()

    def forward(self, x: Any) -> Tensor:
        """The logits in the form that the attack wants."""
        x = x.to(self._like)
        if self._left is not None:
            if len(x) > self._left:
                raise SpentError
            self._left -= len(x)
        try:
            if self._owner is None:
                logits: Tensor = self.model(x)
            else:
                logits = ask(self.model, x, torch.full((len(x),), self._owner))
        except Exception as error:
            self.error = error
            raise
        if self._watch:
            self._look(x.detach(), logits.detach())
        if self._form == "probabilities":
            return logits.softmax(1)
        if self._form == "positive":
            return logits - logits.detach().amin(1, keepdim=True)
        return logits

    def _look(self, x: Images, logits: Tensor) -> None:
        reached = ~resists(logits, self._y.expand(len(x)), targeted=self._targeted)
        if not reached.any():
            return
        start = self._like.expand(int(reached.sum()), *self._like.shape[1:])
        points = mend(x[reached], start, self._threat)
        inside = ((points >= 0) & (points <= 1)).flatten(1).all(1)
        sizes = self._threat.size(points, start).masked_fill(~inside, torch.inf)
        least = int(sizes.argmin())
        if float(sizes[least]) < self._least:
            self._least, self.smallest = float(sizes[least]), points[least : least + 1].clone()


def mend(x_adv: Images, x: Images, threat: ThreatModel) -> Images:
    """Take back what is no more than rounding of another library; worse is left to the judge.

    Under l0 pixels that were not meant to change become exactly the old ones.
    """
    near = ((x_adv >= -ROUNDING) & (x_adv <= 1 + ROUNDING)).flatten(1).all(1)
    x_adv = torch.where(near.view(-1, 1, 1, 1), x_adv.clamp(0, 1), x_adv)
    if threat.norm == "l0":
        touched = ((x_adv - x).abs() > 1e-6).any(1, keepdim=True)
        return torch.where(touched, x_adv, x)
    size = threat.size(x_adv, x)
    rounded = (size > threat.epsilon) & (size <= threat.epsilon * (1 + ROUNDING)) & near
    if not rounded.any():
        return x_adv
    return torch.where(rounded.view(-1, 1, 1, 1), threat.project(x_adv, x), x_adv)

"""The training loop.

All randomness of an epoch derives from the seed and the number of the epoch, so going on after a
kill needs no generator states and ends with the same weights.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_local import processes
from robustbench_local.errors import UserError
from robustbench_local.gradients import deterministic, is_correct
from robustbench_local.randomness import derive_seed, reseed
from robustbench_local.training.augmentation import augment
from robustbench_local.training.course import Course, Training
from robustbench_local.training.progress import Report, epoch_bar
from robustbench_local.training.schedule import Plan, Schedule
from robustbench_local.training.step import Step
from robustbench_local.training.validation import correct_images, robust_accuracy
from robustbench_local.types import Model

if TYPE_CHECKING:
    from rich.console import Console

    from robustbench_local.data import Dataset
    from robustbench_local.defenses.recipe import Recipe
    from robustbench_local.training.store import StateFile

T = TypeVar("T")

LOOK_EVERY = 25
"""Steps between two looks at the loss; each waits for the device."""


class TrainingDiverged(UserError):
    """The loss or the weights are no longer numbers."""


def train(
    model: nn.Module,
    through: Callable[[Model], Model],
    data: "Dataset",
    recipe: "Recipe",
    schedule: Schedule,
    *,
    seed: int,
    device: torch.device,
    state: "StateFile",
    console: "Console | None",
    check: Callable[[], None] = lambda: None,
) -> tuple[Training, Course]:
    """Train to the end, from the last whole epoch in `state` where there is one.

    What the recipe sees, and what is validated, is `through(model)`. Returns what holds the last
    weights, and the course with the selected ones. Raises `TrainingDiverged`, and then keeps
    nothing. `check` is called before anything is kept and may raise.

    Where several processes train together the course is that of process 0, and empty elsewhere.
    """
    group = processes.current()
    plan = schedule.plan(len(data.train))
    mine = slice(None) if group is None else group.share(plan)
    if group is not None and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    training = Training(model, schedule, device)
    seen, averaged = through(model), through(training.average.model)
    leads = group is None or group.leads
    decide = _alone if group is None else group.agree
    course = state.load(training) if leads else Course()
    if group is not None and (taken_up := group.hand_out(training.state(), device)) and not leads:
        training.restore(taken_up)

    descent = _Descent(model, seen, recipe)
    stepping = descent if group is None else group.parallel(descent)

    def next_epoch() -> int | None:
        return None if course.over(plan.epochs, schedule.patience) else course.epoch

    def finish(entry: dict[str, Any], epoch: int, started: float) -> None:
        _check_weights(training.average.model, epoch)
        entry |= _measure(averaged, data, recipe)
        entry["settled"] = recipe.settled(epoch / plan.epochs)
        entry["seconds"] = time.perf_counter() - started
        check()
        course.add(entry, training.average.model)
        state.save(training, course)

    with deterministic():
        while (epoch := decide(next_epoch)) is not None:
            started = time.perf_counter()
            # The draws of another process are others; those of process 0 as if it were alone.
            apart = () if group is None or leads else ("process", group.rank)
            descent.recipe = recipe.begin()
            reseed(seen, derive_seed(seed, "through", epoch, *apart))
            reseed(averaged, derive_seed(seed, "validation"))
            with (
                seeded(derive_seed(seed, "epoch", epoch, *apart), device),
                epoch_bar(console, epoch + 1, plan.epochs, plan.steps) as report,
            ):

                def look(*found: Any, report: Report = report) -> None:
                    report(*found)
                    if group is None:  # else after whole epochs, so that all stop together
                        check()

                try:
                    entry = _one_epoch(
                        training, stepping, data, descent.recipe, schedule, plan, epoch, seed,
                        look, mine,
                    )  # fmt: skip
                    decide(partial(finish, entry, epoch, started))
                except TrainingDiverged:
                    if leads:
                        state.remove()
                    raise
    return training, course


def _alone(decide: Callable[[], T]) -> T:
    return decide()


class _Descent(nn.Module):
    """The loss of a recipe as a module, so that gradients are averaged once each step.

    What the recipe does with the network inside, such as attacks, it does with the bare one.
    """

    def __init__(self, model: nn.Module, seen: Model, recipe: "Recipe") -> None:
        super().__init__()
        self.model, self.seen, self.recipe = model, seen, recipe

    def forward(self, now: Step) -> tuple[Tensor, Tensor]:
        loss, logits = _two(self.recipe, self.recipe.loss(self.seen, now))
        return loss, logits.detach()


def _one_epoch(
    training: Training,
    descent: nn.Module,
    data: "Dataset",
    recipe: "Recipe",
    schedule: Schedule,
    plan: Plan,
    epoch: int,
    seed: int,
    report: Report,
    mine: slice,
) -> dict[str, Any]:
    """Every step of an epoch; its mean loss and its accuracy on what it was trained on.

    Batches are drawn whole, of which the rows `mine` are taken.
    """
    group = processes.current()
    drawing = seed
    if group is not None and not group.leads and not recipe.draws_by_image:
        # What draws by the place in the batch would repeat itself.
        drawing = derive_seed(seed, "process", group.rank)
    model, optimizer, average = training.model, training.optimizer, training.average
    device = data.train.labels.device
    order, generator = _order(plan, len(data.train), seed, epoch, device)
    if recipe.replays > 1:
        order = _replayed(plan, len(data.train), seed, epoch, device, recipe.replays)
    criterion = partial(F.cross_entropy, label_smoothing=schedule.label_smoothing)
    losses = torch.zeros(plan.steps, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    descent.train()
    for number, index in enumerate(order):
        step = epoch * plan.steps + number
        progress = step / plan.total
        if number == 0 or step % recipe.replays == 0:
            x = augment(data.train.pixels(index), schedule.augmentation, generator)
            y = data.train.labels[index]
            x, y = x[mine], y[mine]
        for weights in optimizer.param_groups:
            weights["lr"] = schedule.rate(progress)
        optimizer.zero_grad(set_to_none=True)
        with training.precision():
            loss, logits = descent(Step(x, y, criterion, progress, step, drawing))
        training.scaler.scale(loss).backward()
        training.scaler.step(optimizer)
        training.scaler.update()
        average.update(model)
        losses[number] = loss.detach()
        correct += is_correct(logits, y).sum()
        done = number + 1
        if done % LOOK_EVERY == 0 or done == plan.steps:
            found, right = losses[:done], correct
            if group is not None:
                found, right = group.total(found) / group.size, group.total(right)
            _check_losses(found, epoch)
            report(done, float(found[number]), int(right) / (done * plan.batch_size))
    return {
        "epoch": epoch + 1,
        "loss": float(found.double().mean()),
        "train_accuracy": int(right) / (plan.steps * plan.batch_size),
    }


def _two(recipe: "Recipe", returned: object) -> tuple[Tensor, Tensor]:
    """The loss and the logits that a recipe returned; `UserError` for anything else."""
    match returned:
        case (Tensor(ndim=0) as loss, Tensor(ndim=2) as logits):
            return loss, logits
    raise UserError(
        f"{type(recipe).__name__}.loss did not return a scalar loss and logits of shape (N, K); "
        "expected both as tensors: type return loss, logits"
    )


def _order(
    plan: Plan, images: int, seed: int, epoch: int, device: torch.device
) -> tuple[Tensor, torch.Generator]:
    """The images of an epoch, a row per step: every pass a new permutation, no short batch.

    The generator that drew them serves the other draws of the epoch.
    """
    generator = torch.Generator(device).manual_seed(derive_seed(seed, "order", epoch))
    full = plan.batches * plan.batch_size
    passes = [
        torch.randperm(images, generator=generator, device=generator.device)[:full]
        for _ in range(plan.passes)
    ]
    return torch.cat(passes).view(plan.steps, plan.batch_size), generator


def _replayed(
    plan: Plan, images: int, seed: int, epoch: int, device: torch.device, replays: int
) -> Tensor:
    """An epoch of the whole training's minibatches, each `replays` times in a row.

    It goes through them that much slower, from where the epoch before ended.
    """
    place = torch.arange(epoch * plan.steps, (epoch + 1) * plan.steps) // replays
    rows = [
        _order(plan, images, seed, number, device)[0][
            place[place // plan.steps == number] % plan.steps
        ]
        for number in range(int(place[0]) // plan.steps, int(place[-1]) // plan.steps + 1)
    ]
    return torch.cat(rows)


def _measure(model: nn.Module, data: "Dataset", recipe: "Recipe") -> dict[str, Any]:
    """Validation accuracy, and under the recipe's validation attack where it has one."""
    right = correct_images(model, data.validation)
    attack = recipe.validation_attack()
    return {
        "validation_accuracy": int(right.sum()) / len(right),
        "robust_validation_accuracy": (
            None if attack is None else robust_accuracy(model, data.validation, *attack)
        ),
    }


def _check_losses(losses: Tensor, epoch: int) -> None:
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0, 0])
        raise TrainingDiverged(
            f"training diverged: the loss is {float(losses[step])} in epoch {epoch + 1}, step "
            f"{step + 1}; expected a finite number: lower train.learning_rate"
        )


def _check_weights(model: nn.Module, epoch: int) -> None:
    for name, weight in model.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise TrainingDiverged(
                f"training diverged: {name} is not finite after epoch {epoch + 1}, its last step "
                "included; expected finite weights: lower train.learning_rate"
            )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the body with torch's global generators seeded, and leave them as they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        # Not torch.manual_seed, which would seed other devices too and not restore them.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield

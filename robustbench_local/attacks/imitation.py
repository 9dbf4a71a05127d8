"""Training models to answer as another one does, on points chosen by their own gradient."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_local.attacks.ensemble import Ensemble
from robustbench_local.gradients import deterministic
from robustbench_local.types import Images, Labels

BATCH = 500
"""Images in one pass; decides nothing but memory."""


def new_points(
    seeds: int, rounds: int, *, doubling_rounds: int, reservoir: int, budget: int
) -> list[int]:
    """How many points are labelled before each round of training, the seeds first.

    Every point is augmented in each of the first `doubling_rounds` augmentations, no more than
    `reservoir` of them in each later one, and none once the budget is spent.
    """
    counts = [seeds]
    for augmentation in range(rounds - 1):
        held = sum(counts)
        wanted = held if augmentation < doubling_rounds else min(reservoir, held)
        counts.append(min(wanted, budget - held))
    return counts


def signed_step(step: float, augmentation: int, period: int | None) -> float:
    """The step of an augmentation, counted from 0: its sign changes after every `period`."""
    return -step if period is not None and augmentation // period % 2 else step


def augment(model: nn.Module, x: Images, labels: Labels, step: float) -> Images:
    """From each point, `step` along the sign of the gradient of the output for its label."""
    moved = []
    for rows in slices(len(x)):
        points = x[rows].detach().requires_grad_()
        with torch.enable_grad():
            output = model(points).gather(1, labels[rows, None]).sum()
            (gradient,) = torch.autograd.grad(output, points)
        moved.append((points.detach() + step * gradient.sign()).clamp_(0, 1))
    return torch.cat(moved)


def predict(model: nn.Module, x: Images) -> Labels:
    """The class of the largest output for each image."""
    with torch.no_grad():
        return torch.cat([model(x[rows]).argmax(1) for rows in slices(len(x))])


def slices(count: int) -> list[slice]:
    """The rows of `count` images, some hundreds at a time."""
    return [slice(start, start + BATCH) for start in range(0, count, BATCH)]


def train(
    committee: Ensemble,
    x: Images,
    labels: Labels,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    shift: int,
    generator: torch.Generator,
) -> None:
    """Train every member further from its weights, by its own loss; leaves all in eval mode.

    Each image is seen shifted by up to `shift` pixels either way. `generator`, on the CPU, shuffles
    and shifts.
    """
    optimizer = torch.optim.Adam(committee.parameters(), lr=learning_rate)
    committee.train()
    with torch.enable_grad(), deterministic():
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator)
            # Even parts: batch normalisation cannot learn from a last batch of one image.
            for rows in order.tensor_split(-(-len(x) // batch_size)):
                batch = rows.to(x.device)
                images, wanted = shifted(x[batch], shift, generator), labels[batch]
                losses = [functional.cross_entropy(m(images), wanted) for m in committee.models]
                optimizer.zero_grad(set_to_none=True)
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    committee.eval()


def shifted(x: Images, most: int, generator: torch.Generator) -> Images:
    """Each image moved by up to `most` pixels along each side, black moving in."""
    if most == 0:
        return x
    count, _, height, width = x.shape
    down, right = torch.randint(2 * most + 1, (2, count), generator=generator).to(x.device)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    image = torch.arange(count, device=x.device)[:, None, None]
    padded = functional.pad(x, [most] * 4)
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def stratified(labels: Tensor, generator: torch.Generator) -> Tensor:
    """All rows in an order whose beginnings hold equally many of every class, as far as they go.

    `labels` on the CPU; within a class the order is random.
    """
    order = torch.randperm(len(labels), generator=generator)
    sorted_labels, by_class = labels[order].sort(stable=True)
    first = torch.searchsorted(sorted_labels, sorted_labels)
    turn = torch.arange(len(labels)) - first  # how many of its class come before
    return order[by_class][turn.argsort(stable=True)]

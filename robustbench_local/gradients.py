"""Gradients with respect to the input, the losses attacks climb, and leaving no trace."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module

from robustbench_local.errors import UserError
from robustbench_local.rejection import facing, folded, rejected
from robustbench_local.types import Images, Labels, Logits, Model

Loss: TypeAlias = Literal["ce", "margin", "dlr"]
"""What an attack climbs; see `attack_loss`."""

LossFunction: TypeAlias = Callable[[Logits, Labels, slice], Tensor]
"""Any other loss to climb: logits (N, K), labels (N,) and the rows of the batch these are, to one
value for each, (N,)."""


def attack_loss(logits: Logits, y: Labels, loss: Loss, *, targeted: bool = False) -> Tensor:
    """The loss an attack climbs, one value per example, shape (N,).

    `y` are the true labels or, if `targeted`, the classes wanted: then it is minus the loss. A
    rejection counts as the true class, see `rejection.folded`, and is no success when targeted.

    - `margin`: largest other logit minus that of `y` (Carlini and Wagner 2017, arXiv:1608.04644).
      Above 0 the example is misclassified.
    - `ce`: cross-entropy in its log-odds form, logsumexp(wrong) - true. Cross-entropy is the
      softplus of it, so both rise together and their gradients of one example have the same
      direction; this form alone keeps that gradient when the softmax saturates.
    - `dlr`: difference of logits ratio (Croce and Hein 2020, arXiv:2003.01690); 3 classes or more.
    """
    if targeted:
        return -_plain_loss(logits, y, loss)
    return _plain_loss(folded(logits, y, sum_odds=loss == "ce"), y, loss)


def _plain_loss(logits: Logits, y: Labels, loss: Loss) -> Tensor:
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    if loss == "ce":
        return others.logsumexp(1) - true
    if loss == "margin":
        return others.amax(1) - true
    if loss == "dlr":
        require_classes(loss, logits.shape[1])
        ordered = logits.topk(3, dim=1).values
        return (others.amax(1) - true) / (ordered[:, 0] - ordered[:, 2] + 1e-12)
    raise UserError(f"attack.loss={loss} is unknown; expected ce, margin or dlr")


def require_classes(loss: Loss, classes: int) -> None:
    """Raise `UserError` where a loss is not defined for so few classes."""
    if loss == "dlr" and classes < 3:
        raise UserError(
            f"loss=dlr needs at least 3 classes and the model has {classes}; "
            "type attack.loss=margin"
        )


def targeted_dlr(logits: Logits, y: Labels, wanted: Labels) -> Tensor:
    """Difference of logits ratio of one wrong class, to be climbed, shape (N,).

    (z_wanted - z_y) / (z_1 - (z_3 + z_4) / 2) with the logits in descending order (Croce and Hein
    2020, arXiv:2003.01690). Needs 4 classes; below that it is the plain difference z_wanted - z_y.
    A rejection counts as class `y`.
    """
    logits = folded(logits, y)
    lead = (logits.gather(1, wanted[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    if logits.shape[1] < 4:
        return lead
    ordered = logits.topk(4, dim=1).values
    return lead / (ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3]) + 1e-12)


class InputGradient(NamedTuple):
    """One look at the victim: the gradient, and what its forward pass said on the way."""

    gradient: Tensor  # (N, C, H, W), summed over the samples: attacks use its direction only
    loss: Tensor  # (N,), mean over the samples
    resists: Tensor  # (N,) bool: short of the attack's goal in every sample, see `resists`


def input_gradient(
    model: Model,
    x: Images,
    y: Labels,
    *,
    loss: Loss | LossFunction = "ce",
    eot_samples: int = 1,
    targeted: bool = False,
) -> InputGradient:
    """The gradient of a loss with respect to the input, averaged over fresh forward passes.

    `loss` names one of `attack_loss`, or is a function that knows by itself what is wanted.

    More than one sample is expectation over transformation (Athalye et al. 2018,
    arXiv:1707.07397) for victims that draw random numbers. The batch goes through the model in
    parts that suit the device, see `suitable_parts`.
    """

    def climbed(logits: Logits, labels: Labels, rows: slice) -> Tensor:
        if callable(loss):
            return loss(logits, labels, rows)
        return attack_loss(logits, labels, loss, targeted=targeted)

    looks, rearrange = [], x.device.type == "cpu" and is_layers_alone(model)
    for rows in suitable_parts(model, x):
        part, labels = x[rows].detach(), y[rows]
        part = (_channels_last(part) if rearrange else part).requires_grad_()
        with torch.enable_grad():
            gradient, values, short = _look(model, part, labels, climbed, rows, targeted)
            for _ in range(eot_samples - 1):
                more = _look(model, part, labels, climbed, rows, targeted)
                gradient, values, short = gradient + more[0], values + more[1], short & more[2]
        looks.append(InputGradient(gradient.contiguous(), values / eot_samples, short))
    return looks[0] if len(looks) == 1 else InputGradient(*map(torch.cat, zip(*looks, strict=True)))


def is_layers_alone(model: Model) -> bool:
    """Whether a network is nothing but torch's own layers, with no hook that could do more.

    Such a network computes the same however its images lie in memory. Others may well `.view` the
    features of a convolution, which fails on channels-last ones; see `Normalized` for theirs.
    """
    watched = module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return not watched and all(
        type(part).__module__.startswith("torch.nn.modules.")
        and not any(vars(part)[hooks] for hooks in _HOOKS)
        and "forward" not in vars(part)
        for part in model.modules()
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _channels_last(x: Images) -> Images:
    """The same images with the channels of a pixel side by side, which a CPU convolves faster."""
    if x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    # One channel lies in both orders at once; torch goes by the strides, which say the first.
    return x.contiguous().as_strided(x.shape, (x.shape[1:].numel(), 1, x.shape[3], 1))


def suitable_parts(model: Model, x: Images) -> list[slice]:
    """The batch in equal parts of `images_at_once`; one for a model that says `whole_batches`."""
    whole = getattr(model, "whole_batches", False) is True
    count = 1 if whole else max(1, -(-len(x) // images_at_once(x)))
    bounds = [len(x) * part // count for part in range(count + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def images_at_once(x: Images) -> int:
    """How many images one pass through a model should hold: 192 Ki pixel values on a CPU.

    That is 250 images of MNIST and 64 of CIFAR-10: the activations of many more leave its caches,
    and their memory is taken from and given back to the system at every step. On a GPU 8 Mi.
    """
    values = 3 << 16 if x.device.type == "cpu" else 1 << 23
    return max(1, values // x[0].numel()) if len(x) else 1


def _look(
    model: Model, x: Images, y: Labels, loss: LossFunction, rows: slice, targeted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits = model(x)
    values = loss(logits, y, rows)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    # The sum is NaN where any entry is; looking at each is needed then only.
    if gradient.sum().isnan() and gradient.isnan().any():
        image = rows.start + int(gradient.flatten(1).isnan().any(1).nonzero()[0, 0])
        raise UserError(
            f"the input gradient is NaN for image {image} of a batch; expected finite numbers: "
            "give the part of the model that has no gradient a surrogate (BPDA)"
        )
    return gradient, values.detach(), resists(logits, y, targeted=targeted)


def is_correct(logits: Logits, y: Labels) -> Tensor:
    """Whether the true class has the largest logit, shape (N,); ties as `argmax` breaks them."""
    return logits.detach().argmax(1) == y


def resists(logits: Logits, y: Labels, *, targeted: bool = False) -> Tensor:
    """Whether the attack is short of its goal, shape (N,).

    Without a target the victim is still right or rejects the image; with one it does not accept the
    image as class `y` yet.
    """
    held = is_correct(logits, y)
    return ~held if targeted else held | rejected(logits)


def is_randomized(model: nn.Module) -> bool:
    """Whether any part of the model declares that it draws random numbers (`randomized = True`)."""
    return any(getattr(module, "randomized", False) is True for module in model.modules())


@contextmanager
def pristine(model: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Run the body with `model` frozen and in eval mode; leave everything as it was found.

    Restored also after an exception: every submodule's train/eval flag, every parameter's
    `requires_grad` and `.grad`, and the global random states of Python, NumPy and torch (all
    devices). Inside, `seed` (if given) seeds torch's global generators, for victims that use them,
    and the losses above know whether `model` may reject images, see `rejection.facing`.
    """
    modes = [(module, module.training) for module in model.modules()]
    weights = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(_started_gpus()), facing(model):
        try:
            for module, _ in modes:
                module.training = False
            for weight, _, _ in weights:
                weight.requires_grad_(False)
            if seed is not None:
                seed_global(seed)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for weight, wanted, gradient in weights:
                weight.requires_grad_(wanted)
                weight.grad = gradient
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def deterministic() -> Iterator[None]:
    """Run the body with cuDNN's deterministic kernels, then as before."""
    cudnn = torch.backends.cudnn
    flags = (cudnn.deterministic, cudnn.benchmark)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = flags


def seed_global(seed: int) -> None:
    """Seed torch's global generators, of the CPU and of the GPUs in use.

    Unlike `torch.manual_seed` it leaves nothing behind for GPUs that are started later, which
    `pristine` could not take back.
    """
    torch.default_generator.manual_seed(seed)
    for device in _started_gpus():
        torch.cuda.default_generators[device].manual_seed(seed)


def _started_gpus() -> list[int]:
    # Asking for the state of a GPU would start it.
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return list(range(torch.cuda.device_count())) if started else []

"""What every attack in conf/attack promises; a new YAML file is found by itself."""

import itertools
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from conftest import Raising
from omegaconf import OmegaConf
from scipy import ndimage
from torch import Tensor, nn

from robustbench_local.attacks import Attack, Transfer
from robustbench_local.attacks.samples import with_samples
from robustbench_local.attacks.transfer import Source
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.gradients import pristine
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

CHOICES = sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / "attack").glob("*.yaml"))

DETERMINISTIC = {
    "art", "cw", "ddn", "deepfool", "fgsm", "fmn", "mi_fgsm", "one_pixel_exhaustive",
    "sparse_l1_descent", "spatial", "torchattacks",
}  # fmt: skip
"""Attacks that draw nothing; every other one must answer to its seed."""

EPSILON: dict[Norm, float] = {"linf": 0.1, "l2": 0.6, "l1": 3, "l0": 3, "spatial": 1}

EVERYTHING: dict[Norm, float] = {"linf": 1, "l2": 14, "l1": 192, "l0": 64, "spatial": 1}
"""Budgets that no perturbation of a small image exceeds."""

# The contract holds for any number of steps, so a few are enough.
FEW = {
    "steps": 5,
    "restarts": 2,
    "samples": 3,
    "queries": 60,
    "population": 10,
    "generations": 3,
    "levels": 2,
    "eot_samples": 2,
    "seeds": 20,
    "rounds": 2,
    "epochs": 2,
    "max_iter": 1,
    "init_eval": 5,
    "max_eval": 20,
    "init_size": 20,
    "num_trial": 5,
    "sample_size": 5,
}

# Where these are still too many, or too few to get anywhere.
QUICK: dict[str, dict[str, float]] = {
    "autoattack": {"steps": 2, "queries": 5},
    "substitute": {"learning_rate": 0.01},
    "cw": {"steps": 10, "step_size": 0.3, "binary_search_steps": 3, "initial_const": 10},
}

SINGLE = {"one_pixel_exhaustive"}
"""Attacks that change one pixel however many they may: no match for noise on a hundred."""

BATCH_DRAWS = {"autoattack"}
"""Attacks of other libraries that draw for the whole batch at once."""


@cache
def build(choice: str, seed: int = 0) -> Attack:
    """The attack of a YAML file, with fewer steps."""
    file = Path(__file__).parents[2] / "conf" / "attack" / f"{choice}.yaml"
    config = OmegaConf.load(file)
    config.pop("defaults", None)
    config.seed = seed
    config = OmegaConf.create(with_samples(OmegaConf.to_container(config), 1))
    for node in (config, config.get("kwargs", {}), *config.get("parts", {}).values()):
        for name, few in FEW.items():
            if isinstance(node.get(name), int):
                node[name] = min(few, node[name])
    if "models" in config:  # in float64, see `Network`
        config.models = [{"_target_": f"{__name__}.Substituted", "_partial_": True}]
    config.update(QUICK.get(choice, {}))
    return hydra.utils.instantiate(config, _convert_="object")  # as `building.build` does


class Network(nn.Module):
    """A small network with every kind of state an attack could disturb, in float64 inside.

    In float64, since float32 convolutions of different batch sizes differ by a rounding, and the
    sign of a gradient near zero with them.
    """

    def __init__(self, channels: int, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(channels * 100 + classes + 1000 * seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 6, 3, stride=2),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Flatten(),
                nn.Linear(54, classes),
            ).double()
            self.layers[1].running_mean.normal_()
        # A mixture, as fine-tuning leaves it: batch norm and the convolution stay frozen.
        self.layers[0].eval().requires_grad_(False)
        self.layers[1].eval()
        self.layers[5].bias.grad = torch.ones(classes, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.double()).to(x.dtype)


class Substituted(nn.Module):
    """What a substitute attack trains here."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(int(np.prod(input_shape)), 24),
            nn.ReLU(),
            nn.Linear(24, num_classes),
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.double()).to(x.dtype)


def batch(channels: int, model: nn.Module, *, size: int = 8) -> tuple[Tensor, Tensor]:
    """8x8 images, half of their pixels exactly 0 or 1, and what the model says to them."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randint(-120, 376, (size, channels, 8, 8), generator=generator)
    x = x.clamp_(0, 255).float().div_(255)
    return x, predictions(model, x)


def predictions(model: nn.Module, x: Tensor) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    for module, mode in modes:
        module.training = mode
    return y


def ready(choice: str, model: nn.Module, threat: ThreatModel, *, seed: int = 0) -> Attack:
    """The attack, prepared on a few images and models of its own where it needs them."""
    channels = next(model.parameters()).shape[1]
    x, y = batch(channels, model, size=32)
    classes = predict_shape(model, x)
    attack = build(choice, seed)
    if isinstance(attack, Transfer):
        attack = from_models(attack, [Network(channels, classes, seed=s) for s in (1, 2)])
    return prepare(attack, model, x, y, classes, threat)


def predict_shape(model: nn.Module, x: Tensor) -> int:
    with pristine(model), torch.no_grad():
        return model(x[:1]).shape[1]


def from_models(attack: Transfer, models: list[nn.Module]) -> Transfer:
    return attack.with_models(
        [Source(name=f"seed:{n}", model=m, key="", sha256="") for n, m in enumerate(models)]
    )


def prepare(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, classes: int, threat: ThreatModel
) -> Attack:
    data = Split((x * 255).round().to(torch.uint8), y, torch.arange(len(x)))
    check = snapshot(model)
    ready = attack.fit(Oracle(model, threat, classes), data, threat)
    check()
    return ready


def least(attack: Attack, norm: Norm, epsilon: float | None = None) -> ThreatModel:
    """The threat model that grants the attack no more than it needs.

    Its radius is one at which something is found: where nothing is, one that looks for the smallest
    perturbation returns the images.
    """
    if epsilon is None:
        epsilon = (EVERYTHING if attack.minimum_norm else EPSILON)[norm]
    return ThreatModel(norm=norm, epsilon=epsilon, access=attack.needs)


def numpy_size(x_adv: Tensor, x: Tensor, norm: Norm) -> np.ndarray:
    if norm == "spatial":
        return scipy_share(x_adv, x)
    delta = np.abs(x_adv.numpy().astype(np.float64) - x.numpy().astype(np.float64))
    if norm == "l0":
        return (delta.max(axis=1) > 0).sum(axis=(1, 2))
    delta = delta.reshape(len(delta), -1)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    return np.linalg.norm(delta, ord=order, axis=1)


@cache
def scipy_transforms(side: int) -> list[tuple[float, np.ndarray]]:
    """The share and the matrix of every rotation and translation of the grid, the least first."""
    pictures = np.eye(side * side).reshape(-1, side, side)
    furthest = round(side / 10)
    middle = (side - 1) / 2
    every = []
    for degrees in np.linspace(-30, 30, 31):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])  # as scipy's own rotate does
        for down, right in itertools.product(np.linspace(-furthest, furthest, 5), repeat=2):
            offset = [0, middle, middle] - turn @ [0, middle + down, middle + right]
            moved = ndimage.affine_transform(pictures, turn, offset, order=1, mode="grid-constant")
            share = max(abs(degrees) / 30, abs(down) / furthest, abs(right) / furthest)
            every.append((share, moved.reshape(side * side, -1)))
    return sorted(every, key=lambda each: each[0])


def scipy_share(x_adv: Tensor, x: Tensor) -> np.ndarray:
    """The least share of a turn (about the centre) and a move that made one of the other."""
    shares = np.full(len(x), np.inf)
    before, after = (part.flatten(2).double().numpy() for part in (x, x_adv))
    for share, matrix in scipy_transforms(x.shape[-1]):
        alike = np.abs(before @ matrix - after).max((1, 2)) < 1e-4
        shares[alike & np.isinf(shares)] = share
    return shares


PAIRS = [(choice, norm) for choice in CHOICES for norm in sorted(build(choice).norms)]


def pairs_without(*left_out: str) -> pytest.MarkDecorator:
    """Every attack under every norm it serves, but for some attacks."""
    chosen = [pair for pair in PAIRS if pair[0] not in left_out]
    return pytest.mark.parametrize(("choice", "norm"), chosen)


pairs = pairs_without()
each = pytest.mark.parametrize("choice", CHOICES)


def first_norm(choice: str) -> Norm:
    return sorted(build(choice).norms)[-1]


def test_the_folder_is_found() -> None:
    assert {"fgsm", "pgd", "pgd_restarts", "noise"} <= set(CHOICES)


@pairs
@pytest.mark.parametrize(
    ("channels", "classes"),
    [
        (1, 10),
        (3, 2),
        *(
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in [(1, 2), (1, 5), (3, 5), (3, 10)]
        ),
    ],
)
def test_returns_images_inside_the_budget(
    choice: str, norm: Norm, channels: int, classes: int
) -> None:
    model = Network(channels, classes)
    x, y = batch(channels, model)
    threat = least(build(choice), norm)
    attack = ready(choice, model, threat)
    before = x.clone()

    x_adv = attack(model, x, y, threat)

    assert torch.equal(x, before)
    assert (x_adv.shape, x_adv.dtype, x_adv.device) == (x.shape, x.dtype, x.device)
    assert not x_adv.requires_grad
    assert not torch.equal(x_adv, x)
    threat.check(x_adv, x)
    assert (numpy_size(x_adv, x, norm) <= threat.epsilon + 1e-6 * max(1, threat.epsilon)).all()
    assert float(x_adv.min()) >= -1e-6
    assert float(x_adv.max()) <= 1 + 1e-6
    assert torch.equal(attack(model, x, y, threat), x_adv)
    # The attacker may not depend on seeing more than the threat model grants.
    assert torch.equal(attack(Oracle(model, threat, classes), x, y, threat), x_adv)


@pairs
def test_epsilon_zero_returns_the_images(choice: str, norm: Norm) -> None:
    model = Network(3, 5)
    x, y = batch(3, model)
    threat = least(build(choice), norm, epsilon=0)
    x_adv = build(choice)(model, x, y, threat)
    assert torch.equal(x_adv, x)
    assert x_adv.data_ptr() != x.data_ptr()


@pairs
def test_an_empty_batch_comes_back_empty(choice: str, norm: Norm) -> None:
    x = torch.zeros(0, 3, 8, 8)
    y = torch.zeros(0, dtype=torch.int64)
    assert build(choice)(Network(3, 5), x, y, least(build(choice), norm)).shape == x.shape


@pairs
def test_the_seed_decides_the_draws(choice: str, norm: Norm) -> None:
    model = Network(1, 5)
    x, y = batch(1, model)
    threat = least(build(choice), norm)
    first, second = (ready(choice, model, threat, seed=s)(model, x, y, threat) for s in (0, 1))
    assert torch.equal(first, second) == (choice in DETERMINISTIC)


@pairs_without(*BATCH_DRAWS)
def test_the_batch_does_not_matter(choice: str, norm: Norm) -> None:
    model = Network(3, 5)
    x, y = batch(3, model)
    threat = least(build(choice), norm)
    attack = ready(choice, model, threat)
    whole = attack(model, x, y, threat)
    halves = torch.cat([attack(model, x[rows], y[rows], threat) for rows in halves_of(len(x))])
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    permuted = attack(model, x[order], y[order], threat)
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(permuted, whole[order], rtol=0, atol=1e-6)


def halves_of(size: int) -> tuple[slice, slice]:
    return slice(0, size // 2), slice(size // 2, size)


@each
def test_memory_layout_and_views_do_not_matter(choice: str) -> None:
    """Evaluation may hand over channels-last images, or every second row of a larger batch."""
    model = Network(3, 5)
    x, y = batch(3, model)
    norm = first_norm(choice)
    threat = least(build(choice), norm)
    attack = ready(choice, model, threat)
    expected = attack(model, x, y, threat)
    views = [x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 0)[::2]]
    for view in views:
        assert not view.is_contiguous()
        torch.testing.assert_close(attack(model, view, y, threat), expected, rtol=0, atol=1e-6)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember everything an attack may not change; the result asserts that nothing has."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    gradients = {
        name: (weight.grad, None if weight.grad is None else weight.grad.clone())
        for name, weight in model.named_parameters()
    }
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def check() -> None:
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert {n: weight.requires_grad for n, weight in model.named_parameters()} == wanted
        for name, weight in model.named_parameters():
            assert weight.grad is gradients[name][0], name
            assert weight.grad is None or torch.equal(weight.grad, gradients[name][1]), name
        assert random.getstate() == python
        for now, then in zip(np.random.get_state(), numpy, strict=True):
            assert np.array_equal(now, then)
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert torch.is_grad_enabled()

    return check


@pairs
def test_nothing_is_left_changed(choice: str, norm: Norm) -> None:
    model = Network(1, 5)
    x, y = batch(1, model)
    threat = least(build(choice), norm)
    attack = ready(choice, model, threat)
    check = snapshot(model)
    attack(model, x, y, threat)
    check()


@each
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_nothing_is_left_changed_when_the_model_raises(choice: str, calls: int) -> None:
    model = Network(1, 5)
    x, y = batch(1, model)
    norm = first_norm(choice)
    threat = least(build(choice), norm)
    attack = ready(choice, model, threat)
    victim = Raising(model, calls)
    check = snapshot(victim)
    try:
        attack(victim, x, y, threat)
    except RuntimeError as error:
        assert "the victim broke down" in str(error)
    else:
        assert victim.left > 0, "the attack swallowed the exception of the victim"
    check()


@each
def test_without_autograd_around_it_the_result_is_the_same(choice: str) -> None:
    model = Network(1, 5)
    x, y = batch(1, model)
    threat = least(build(choice), first_norm(choice))
    attack = ready(choice, model, threat)
    expected = attack(model, x, y, threat)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, threat), expected)


@each
def test_refuses_norms_it_does_not_serve(choice: str) -> None:
    attack = build(choice)
    model = Network(1, 5)
    x, y = batch(1, model)
    for norm in sorted(set(EPSILON) - attack.norms):
        with pytest.raises(UserError) as caught:
            attack(model, x, y, least(attack, norm))
        assert f"threat.norm={norm}" in str(caught.value)
        assert all(served in str(caught.value) for served in attack.norms)


@each
def test_refuses_an_access_that_is_too_little(choice: str) -> None:
    attack = build(choice)
    model = Network(1, 5)
    x, y = batch(1, model)
    norm = first_norm(choice)
    too_little = {"gradients": ["scores", "labels"], "scores": ["labels"], "labels": []}
    for access in too_little[attack.needs]:
        with pytest.raises(UserError) as caught:
            attack(model, x, y, ThreatModel(norm=norm, epsilon=EPSILON[norm], access=access))
        assert f"threat.access={access}" in str(caught.value)
        assert f"needs access to {attack.needs}" in str(caught.value)


@pytest.mark.slow
@pairs_without(*SINGLE)
def test_breaks_at_least_what_noise_breaks(
    choice: str, norm: Norm, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """On digits, with budgets where noise alone already breaks some."""
    attack = build(choice)
    x, y = (part[:100] for part in digit_images)
    epsilon = {"linf": 0.5, "l2": 7, "l1": 120, "l0": 100, "spatial": 1}[norm]
    generator = torch.Generator().manual_seed(0)
    if norm == "linf":
        noisy = x + epsilon * (2 * torch.rand(x.shape, generator=generator) - 1)
    elif norm == "spatial":
        turns = 60 * torch.rand(len(x), generator=generator).numpy() - 30
        turned = [
            ndimage.rotate(i, d, axes=(2, 1), reshape=False, order=1)
            for i, d in zip(x.numpy(), turns, strict=True)
        ]
        noisy = torch.from_numpy(np.stack(turned)).roll((3, -3), (2, 3))
    elif norm == "l0":
        pixels = torch.rand(x.shape, generator=generator)
        chosen = torch.rand(len(x), 784, generator=generator).argsort(1).argsort(1) < epsilon
        noisy = torch.where(chosen.view_as(x), pixels, x)
    else:
        delta = torch.randn(x.shape, generator=generator)
        length = delta.flatten(1).norm(p=int(norm[1]), dim=1).view(-1, 1, 1, 1)
        noisy = x + epsilon * delta / length
    with torch.no_grad():
        by_noise = digit_model(noisy.clamp(0, 1)).argmax(1) != y
    if attack.foreign:  # other libraries ask about one image after the other
        some = by_noise.sort(descending=True, stable=True).indices[:30]
        x, y, by_noise = x[some], y[some], by_noise[some]
    fooled_by_noise = int(by_noise.sum())
    threat = least(attack, norm, epsilon)
    if isinstance(attack, Transfer):
        attack = from_models(attack, [digit_model])
    own = (part[-200:] for part in digit_images)
    attack = prepare(attack, digit_model, *own, 10, threat)
    x_adv = attack(digit_model, x, y, threat)
    with torch.no_grad():
        fooled = int((digit_model(x_adv).argmax(1) != y).sum())
    assert fooled_by_noise >= 3
    assert fooled >= fooled_by_noise

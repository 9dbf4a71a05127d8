import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import LinearVictim, NoisyInput
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from robustbench_local.errors import UserError
from robustbench_local.gradients import (
    attack_loss,
    input_gradient,
    is_correct,
    is_layers_alone,
    pristine,
)


def logits_and_labels(classes: int = 6, count: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        3 * torch.randn(count, classes, generator=generator),
        torch.randint(classes, (count,), generator=generator),
    )


def by_hand(logits: Tensor, y: Tensor, loss: str) -> Tensor:
    """The formulas, row by row."""
    values = []
    for row, label in zip(logits.double().numpy(), y.tolist(), strict=True):
        wrong = np.delete(row, label)
        if loss == "margin":
            values.append(wrong.max() - row[label])
        elif loss == "ce":
            values.append(np.log(np.exp(wrong).sum()) - row[label])
        else:
            first, _, third = np.sort(row)[::-1][:3]
            values.append((wrong.max() - row[label]) / (first - third))
    return torch.tensor(values)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("classes", [3, 10])
def test_losses_are_their_formulas(loss: str, classes: int) -> None:
    logits, y = logits_and_labels(classes)
    expected = by_hand(logits, y, loss).float()
    torch.testing.assert_close(attack_loss(logits, y, loss), expected, rtol=1e-5, atol=1e-5)


def test_log_odds_is_cross_entropy_before_the_softplus() -> None:
    logits, y = logits_and_labels()
    expected = functional.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(functional.softplus(attack_loss(logits, y, "ce")), expected)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_two_classes_have_one_loss(loss: str) -> None:
    logits, y = logits_and_labels(2)
    expected = torch.where(y == 0, logits[:, 1] - logits[:, 0], logits[:, 0] - logits[:, 1])
    torch.testing.assert_close(attack_loss(logits, y, loss), expected)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_a_shift_of_the_logits_changes_nothing(loss: str) -> None:
    logits, y = logits_and_labels()
    shifted = attack_loss(logits - 50, y, loss)
    torch.testing.assert_close(shifted, attack_loss(logits, y, loss), rtol=1e-4, atol=1e-4)


def test_dlr_does_not_depend_on_the_scale() -> None:
    logits, y = logits_and_labels()
    for scale in (1e-3, 1e4):
        torch.testing.assert_close(
            attack_loss(scale * logits, y, "dlr"), attack_loss(logits, y, "dlr")
        )


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_the_sign_says_whether_it_is_misclassified(loss: str) -> None:
    logits, y = logits_and_labels(3, 500)
    assert torch.equal(attack_loss(logits, y, loss) > 0, ~is_correct(logits, y))


def test_losses_that_cannot_be_computed() -> None:
    logits, y = logits_and_labels(2)
    with pytest.raises(UserError, match=r"at least 3 classes .* 2; type attack.loss=margin"):
        attack_loss(logits, y, "dlr")
    with pytest.raises(UserError, match="hinge is unknown; expected ce, margin or dlr"):
        attack_loss(logits, y, "hinge")


def linear(classes: int = 6, scale: float = 1) -> tuple[LinearVictim, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    model = LinearVictim(torch.randn(classes, 48, generator=generator), torch.zeros(classes))
    model.scale = scale
    x = torch.rand(30, 3, 4, 4, generator=generator)
    return model, x, torch.randint(classes, (30,), generator=generator)


def test_the_direction_is_that_of_cross_entropy() -> None:
    model, x, y = linear(scale=0.3)
    images = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(functional.cross_entropy(model(images), y), images)
    gradient = input_gradient(model, x, y, loss="ce").gradient
    cosine = functional.cosine_similarity(gradient.flatten(1), expected.flatten(1))
    assert float(cosine.min()) > 1 - 1e-6


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_gradients_are_the_slope(loss: str) -> None:
    """Against finite differences in float64."""
    model, x, y = linear()
    x = x.double()
    gradient = input_gradient(model, x, y, loss=loss).gradient
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=x.dtype)
    with torch.no_grad():
        rise = attack_loss(model(x + 1e-6 * way), y, loss) - attack_loss(
            model(x - 1e-6 * way), y, loss
        )
    slope = (gradient * way).flatten(1).sum(1)
    torch.testing.assert_close(slope, rise / 2e-6, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_saturation_does_not_silence_the_gradient(loss: str) -> None:
    """Where torch's own cross-entropy has a gradient of exactly zero."""
    model, x, _ = linear(scale=1e4)
    with torch.no_grad():
        y = model(x).argmax(1)
    images = x.clone().requires_grad_()
    silent = torch.autograd.grad(functional.cross_entropy(model(images), y), images)[0]
    assert (silent == 0).flatten(1).all(1).float().mean() > 0.9
    look = input_gradient(model, x, y, loss=loss)
    assert (look.gradient.flatten(1).abs().amax(1) > 0).all()
    assert torch.isfinite(look.gradient).all()
    assert torch.isfinite(look.loss).all()


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_each_image_has_a_gradient_of_its_own(loss: str) -> None:
    model, x, y = linear()
    whole = input_gradient(model, x, y, loss=loss)
    alone = input_gradient(model, x[3:4], y[3:4], loss=loss)
    torch.testing.assert_close(whole.gradient[3:4], alone.gradient)
    torch.testing.assert_close(whole.loss[3:4], alone.loss)


def test_what_a_look_tells() -> None:
    model, x, y = linear()
    with torch.no_grad():
        logits = model(x)
    look = input_gradient(model, x, y, loss="margin")
    assert torch.equal(look.resists, logits.argmax(1) == y)
    torch.testing.assert_close(look.loss, attack_loss(logits, y, "margin"))
    assert not look.loss.requires_grad
    assert not look.gradient.requires_grad
    assert not x.requires_grad


def test_samples_are_fresh_and_counted() -> None:
    """Correct means correct in every sample; the loss is their mean, the gradient their sum."""
    model, x, y = linear()
    noisy = NoisyInput(model, 0.5)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        look = input_gradient(noisy, x, y, loss="margin", eot_samples=4)
        torch.manual_seed(3)
        singles = [input_gradient(noisy, x, y, loss="margin") for _ in range(4)]
    assert len({float(single.loss[0]) for single in singles}) == 4
    torch.testing.assert_close(look.gradient, sum(single.gradient for single in singles))
    torch.testing.assert_close(look.loss, torch.stack([s.loss for s in singles]).mean(0))
    assert torch.equal(look.resists, torch.stack([s.resists for s in singles]).all(0))


def test_gradients_flow_where_autograd_is_switched_off() -> None:
    model, x, y = linear()
    expected = input_gradient(model, x, y)
    with torch.no_grad():
        assert torch.equal(input_gradient(model, x, y).gradient, expected.gradient)
        assert not torch.is_grad_enabled()


def test_a_tie_counts_as_argmax_breaks_it() -> None:
    assert is_correct(torch.zeros(2, 3), torch.tensor([0, 1])).tolist() == [True, False]


class Meddler(nn.Module):
    """A network in a mixture of states, that draws from every global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
        )
        self.layers[1].eval()
        self.layers[0].weight.requires_grad_(False)
        self.layers[3].weight.grad = torch.ones(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        return self.layers(x) + torch.rand(1)


@pytest.fixture
def meddler() -> Iterator[Meddler]:
    """A meddler; whether it is as before is asserted afterwards."""
    model = Meddler()
    modes = [module.training for module in model.modules()]
    wanted = [weight.requires_grad for weight in model.parameters()]
    gradients = [weight.grad for weight in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    yield model
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert all(a.grad is b for a, b in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert random.getstate() == generators[0]
    assert np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])


def test_pristine_freezes_and_restores(meddler: Meddler) -> None:
    with pristine(meddler):
        assert not any(module.training for module in meddler.modules())
        assert not any(weight.requires_grad for weight in meddler.parameters())
        meddler(torch.ones(3, 4))
        meddler.layers[3].weight.grad = torch.zeros(2, 4)
        meddler.layers[0].weight.grad = torch.zeros(4, 4)
        meddler.layers[3].weight.requires_grad_(True)
        meddler.train()
        meddler.layers[1].eval()


def test_pristine_restores_after_an_exception(meddler: Meddler) -> None:
    with pytest.raises(RuntimeError, match="halfway"), pristine(meddler, seed=3):
        meddler(torch.ones(3, 4))
        raise RuntimeError("halfway")


def test_pristine_can_be_nested(meddler: Meddler) -> None:
    with pristine(meddler, seed=1):
        first = meddler(torch.ones(3, 4))
        with pristine(meddler, seed=1):
            assert torch.equal(meddler(torch.ones(3, 4)), first)
        after = meddler(torch.ones(3, 4))
    with pristine(meddler, seed=1):
        meddler(torch.ones(3, 4))
        assert torch.equal(meddler(torch.ones(3, 4)), after)


def test_pristine_seeds_what_happens_inside(meddler: Meddler) -> None:
    seen = []
    for seed in (5, 5, 6):
        with pristine(meddler, seed=seed):
            seen.append(meddler(torch.ones(3, 4)))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


class Sizes(nn.Module):
    """Remembers how many images came at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(len(x))
        return self.model(x)


@pytest.mark.parametrize("eot_samples", [1, 2])
def test_large_batches_go_through_in_parts_and_the_gradient_is_the_same(eot_samples):
    generator = torch.Generator().manual_seed(0)
    model = Sizes(nn.Sequential(nn.Flatten(), nn.Linear(784, 5)))
    x = torch.rand(600, 1, 28, 28, generator=generator)
    y = torch.randint(0, 5, (600,), generator=generator)
    wanted = (y + 1) % 5

    def lead(logits, labels, rows):
        assert torch.equal(labels, y[rows])
        return logits.gather(1, wanted[rows, None]).squeeze(1)

    for loss in ("ce", "margin", lead):
        model.seen.clear()
        parts = input_gradient(model, x, y, loss=loss, eot_samples=eot_samples)
        assert model.seen == [size for size in (200, 200, 200) for _ in range(eot_samples)]
        model.whole_batches = True
        whole = input_gradient(model, x, y, loss=loss, eot_samples=eot_samples)
        model.whole_batches = False
        assert model.seen[-1] == 600
        for part, one in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, one)


def test_a_nan_gradient_names_the_image_of_the_whole_batch():
    class Holed(nn.Module):
        def forward(self, x):
            x = x.flatten(1)
            return torch.stack((x.sum(1), (x[:, 0] - 0.5).sqrt()), 1)

    x = torch.ones(400, 1, 28, 28)
    x[390, 0, 0, 0] = 0.5
    y = torch.zeros(400, dtype=torch.int64)
    with pytest.raises(UserError, match="NaN for image 390"):
        input_gradient(Holed(), x, y, loss=lambda logits, y, rows: 0 * logits[:, 1])


class Strides(nn.Conv2d):
    """A convolution that remembers how its images lay in memory."""

    __module__ = "torch.nn.modules.conv"

    def forward(self, x):
        self.seen = x.stride()
        return super().forward(x)


@pytest.mark.parametrize(
    "anything_may_happen",
    [
        lambda network: network[1].register_forward_hook(lambda *_: None),
        lambda network: network[1].register_forward_pre_hook(lambda *_: None),
        lambda network: network[1].register_full_backward_hook(lambda *_: None),
        lambda network: network.register_full_backward_pre_hook(lambda *_: None),
        lambda network: register_module_forward_hook(lambda *_: None),
        lambda network: in_its_own_way(network),
    ],
    ids=["hook", "pre-hook", "backward hook", "backward pre-hook", "global hook", "own forward"],
)
@pytest.mark.parametrize(("channels", "strides"), [(1, (64, 1, 8, 1)), (3, (192, 1, 24, 3))])
def test_torchs_own_layers_get_images_with_channels_side_by_side(
    channels, strides, anything_may_happen
):
    torch.manual_seed(0)
    first = Strides(channels, 4, 3)
    network = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x, y = torch.rand(6, channels, 8, 8), torch.arange(6) % 5
    look = input_gradient(network, x, y)
    assert first.seen == strides
    assert look.gradient.is_contiguous()
    with anything_may_happen(network):
        plain = input_gradient(network, x, y)
        assert first.seen == x.stride()
    torch.testing.assert_close(look, plain)
    assert is_layers_alone(network)


@contextmanager
def in_its_own_way(network):
    network[0].forward = network[0].forward
    yield
    del network[0].forward


def test_a_network_that_views_its_features_gets_plain_images():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

        def forward(self, x):
            return self.head(self.conv(x).view(len(x), -1))

    network, x = Viewing(), torch.rand(6, 3, 8, 8)
    with pytest.raises(RuntimeError, match="view"):
        network(x.contiguous(memory_format=torch.channels_last))
    assert input_gradient(network, x, torch.arange(6) % 5).gradient.shape == x.shape

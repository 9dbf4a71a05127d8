"""Two defenses that are in the suite for how they fall."""

import pytest
import torch
from conftest import accuracy, digit_cnn
from torch import nn

from robustbench_local.attacks import PGD
from robustbench_local.defenses import SAP, Defense, Temperature
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel

LINF = ThreatModel(norm="linf", epsilon=0.3)


class Two(nn.Module):
    """The identity, then a linear layer that shows what comes in."""

    def __init__(self, size):
        super().__init__()
        self.first, self.second = (
            nn.Linear(size, size, bias=False),
            nn.Linear(size, size, bias=False),
        )
        nn.init.eye_(self.first.weight)
        nn.init.eye_(self.second.weight)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))


def test_activations_are_dropped_as_often_as_the_paper_says_and_keep_their_mean():
    values = torch.tensor([0.0, 0.1, 0.2, 0.7])
    x = values.view(1, 1, 2, 2).repeat(40_000, 1, 1, 1)
    victim = SAP(samples=1.0)(Two(4))
    seen = victim(x)
    share = values / values.sum()
    chance = 1 - (1 - share) ** 4  # of four draws with replacement
    assert torch.allclose((seen > 0).float().mean(0), chance, atol=0.01)
    for column in range(1, 4):  # one value where it is kept
        kept = seen[seen[:, column] > 0, column]
        assert torch.allclose(kept, (values / chance)[column].expand_as(kept), rtol=1e-4)
    assert torch.allclose(seen.mean(0), values, atol=0.01)


def test_draws_come_from_the_seed_and_the_network_is_left_alone():
    network, x = digit_cnn().eval(), torch.rand(5, 1, 28, 28)
    plain = network(x)
    victim = SAP()(network)
    state = torch.get_rng_state()
    victim.reseed(1)
    first, second = victim(x), victim(x)
    assert not torch.equal(first, second)
    victim.reseed(1)
    assert torch.equal(victim(x), first)
    assert torch.equal(network(x), plain) and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError):
        victim(torch.rand(5, 3, 28, 28))  # a pass that fails leaves no hooks either
    assert torch.equal(network(x), plain)


def test_pixels_are_kept_however_often_a_model_asks_its_network():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Two(64)

        def forward(self, x):
            return torch.stack((self.network(x), self.network(x)))

    model, given = Twice(), []
    model.network.first.register_forward_hook(lambda layer, inputs, out: given.append(inputs[0]))
    x = 0.1 + torch.rand(2, 1, 8, 8)
    assert (SAP()(model)(x) == 0).any()
    assert all(torch.equal(pixels, x.flatten(1)) for pixels in given) and len(given) == 2


def test_dead_activations_are_no_error():
    network = Two(4)
    nn.init.zeros_(network.first.weight)
    assert torch.equal(SAP()(network)(torch.rand(3, 1, 2, 2)), torch.zeros(3, 4))


def test_pruning_falls_under_averaged_gradients(digit_model, digit_images):
    x, y = (part[:60] for part in digit_images)
    victim = Defense(wrap={"sap": SAP(samples=0.5)}).apply(digit_model)
    assert accuracy(victim, x, y) > 0.8
    x_adv = PGD(steps=10, step_size=0.25, eot_samples=5)(victim, x, y, LINF)
    assert accuracy(victim, x_adv, y) < 0.1


def test_a_sharp_softmax_hides_the_textbook_gradient_and_nothing_else(digit_model, digit_images):
    x, y = (part[:60] for part in digit_images)
    victim = Temperature(temperature=0.001)(digit_model)
    assert torch.equal(victim(x).argmax(1), digit_model(x).argmax(1))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(victim(leaf), y), leaf)
    flat = gradient.flatten(1).abs().amax(1)
    assert (flat == 0).float().mean() > 0.5  # the masked gradient of the literature
    for loss in ("ce", "margin"):  # ours keeps it, see `attack_loss`
        x_adv = PGD(steps=10, step_size=0.25, loss=loss)(victim, x, y, LINF)
        plain = PGD(steps=10, step_size=0.25, loss=loss)(digit_model, x, y, LINF)
        assert accuracy(victim, x_adv, y) <= accuracy(digit_model, plain, y) + 1 / 60


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Temperature(temperature=0), "temperature.temperature=0"),
        (lambda: SAP(samples=-1), "sap.samples=-1"),
        (lambda: SAP(eot_samples=0), "sap.eot_samples=0"),
        (lambda: SAP()(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))), "no such layer"),
    ],
)
def test_wrong_settings_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()

"""Images made on other models, and the models they are made on."""

import copy

import pytest
import torch
from conftest import LinearVictim, accuracy, digit_cnn, train
from torch import Tensor, nn

from robustbench_local.attacks import Momentum, Transfer
from robustbench_local.attacks.transfer import Source
from robustbench_local.data import Dataset
from robustbench_local.errors import UserError
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel

LABELS = ThreatModel(norm="linf", epsilon=0.3, access="labels")
PLAIN = {"step_size": 0.1, "diversity_probability": 0.0, "kernel_size": 1}


def transfer(*models: nn.Module, **settings: object) -> Transfer:
    loaded = [Source(f"seed:{n}", model, f"key{n}", f"hash{n}") for n, model in enumerate(models)]
    return Transfer(**settings).with_models(loaded)


def test_from_a_copy_it_is_as_strong_as_with_all_access(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:100] for part in digit_images)
    oracle = Oracle(digit_model, LABELS, 10)
    carried = transfer(copy.deepcopy(digit_model), **PLAIN)(oracle, x, y, LABELS)
    gradients = ThreatModel(norm="linf", epsilon=0.3)
    assert torch.equal(carried, Momentum()(digit_model, x, y, gradients))
    assert oracle.forward_passes == 0
    assert accuracy(digit_model, carried, y) <= 0.02


def test_of_several_models_the_mean_logits_are_attacked() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, 64, generator=generator)
    x = torch.rand(20, 1, 8, 8, generator=generator)
    y = torch.arange(20) % 4
    threat = ThreatModel(norm="l2", epsilon=0.5)
    models = [LinearVictim(weight, torch.zeros(4)) for weight in weights]
    mean = LinearVictim(weights.double().mean(0), torch.zeros(4))
    together = transfer(*models, **PLAIN)(models[0], x, y, threat)
    torch.testing.assert_close(together, Momentum()(mean, x, y, threat), rtol=0, atol=1e-5)
    alone = transfer(models[0], **PLAIN)(models[0], x, y, threat)
    assert float((alone - together).abs().max()) > 0.01


def test_the_sources_are_left_as_they_were(digit_images: tuple[Tensor, Tensor]) -> None:
    source = digit_cnn(4).train()
    source[0].weight.grad = torch.ones_like(source[0].weight)
    x, y = (part[:4] for part in digit_images)
    before = torch.get_rng_state()
    transfer(source)(digit_cnn(4, seed=1), x, y, LABELS)
    assert source.training
    assert all(weight.requires_grad for weight in source.parameters())
    assert torch.equal(source[0].weight.grad, torch.ones_like(source[0].weight))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_report_names_the_weights() -> None:
    told = transfer(digit_cnn(4), digit_cnn(4)).report(LABELS)["sources"]
    assert told[1] == {"name": "seed:1", "key": "key1", "sha256": "hash1"}


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        (["seed:x"], "'seed:x' cannot be read"),
        (["seed:-1"], "'seed:-1' cannot be read"),
        (["seed"], "'seed' cannot be read"),
        (["cache:"], "'cache:' cannot be read"),
        (["http://x"], "expected seed:N, cache:KEY or file:PATH"),
        ([], "expected a list"),
        ("seed:1", "expected a list"),
        ([1], "expected a list"),
    ],
)
def test_unknown_sources_are_refused(sources: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Transfer(sources=sources)


def test_what_it_would_have_to_ask_for_is_refused() -> None:
    with pytest.raises(UserError, match=r"attack\.target=least_likely"):
        Transfer(target="least_likely")


def test_without_models_it_says_so(digit_images: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:4] for part in digit_images)
    with pytest.raises(UserError, match="has no models yet"):
        Transfer()(digit_cnn(4), x, y, LABELS)


@pytest.fixture(scope="module")
def others(digits: Dataset) -> tuple[nn.Module, nn.Module]:
    own = digits.train.pixels(slice(None)), digits.train.labels
    first, second = (train(digit_cnn(seed=s), *own, epochs=4, seed=s) for s in (1, 2))
    return first, second


@pytest.mark.slow
def test_what_carries_over_between_networks_trained_apart(
    others: tuple[nn.Module, nn.Module],
    digit_model: nn.Module,
    digit_images: tuple[Tensor, Tensor],
) -> None:
    first, second = others
    x, y = (part[:500] for part in digit_images)
    threat = ThreatModel(norm="linf", epsilon=0.15, access="labels")

    def made(*models: nn.Module, **settings: object) -> Tensor:
        return transfer(*models, **{**PLAIN, **settings})(digit_model, x, y, threat)

    def left(*models: nn.Module, **settings: object) -> float:
        return accuracy(digit_model, made(*models, **settings), y)

    plain = left(first)
    assert plain < 0.5  # of 0.97
    assert left(first, second) < plain - 0.03
    assert left(first, step_size=0.3) < plain - 0.03
    assert left(first, kernel_size=5) < plain - 0.03
    # On this pair diversity and momentum change the images, not how many carry over.
    for settings in ({"diversity_probability": 1.0}, {"decay": 0.0}):
        assert float((made(first, **settings) - made(first)).abs().mean()) > 0.003
        assert left(first, **settings) < plain + 0.05

"""The substitute attack: what it asks, what it may not see, and that it works."""

import random

import numpy as np
import pytest
import torch
from conftest import Counting, LinearVictim, accuracy
from torch import Tensor, nn

from robustbench_local.attacks import PGD, Momentum, Substitute
from robustbench_local.attacks.imitation import (
    augment,
    new_points,
    shifted,
    signed_step,
    stratified,
)
from robustbench_local.attacks.substitute import COMMITTEE
from robustbench_local.data import Dataset, Split
from robustbench_local.errors import UserError
from robustbench_local.models import MLP
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel

LABELS = ThreatModel(norm="linf", epsilon=0.2, access="labels")
SMALL = {"seeds": 12, "rounds": 3, "epochs": 3, "models": (MLP,)}


class Misleading(nn.Module):
    """The same labels, from scores that say nothing else of the truth."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return -logits.abs() * 7 - 50 + 1e4 * (logits == logits.amax(1, keepdim=True))


def victim(classes: int = 3) -> LinearVictim:
    weight = torch.randn(classes, 64, generator=torch.Generator().manual_seed(5))
    return LinearVictim(weight, -weight.sum(1) / 2)


def split(model: nn.Module, count: int = 40, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 8, 8), generator=generator).to(torch.uint8)
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    return Split(images, labels, torch.arange(count))


def oracle(model: nn.Module, threat: ThreatModel = LABELS, classes: int = 3) -> Oracle:
    return Oracle(model, threat, classes)


def images() -> tuple[Tensor, Tensor]:
    data = split(victim(), 16, seed=9)
    return data.pixels(slice(None)), data.labels


def attacked(attack: Substitute, model: nn.Module, threat: ThreatModel = LABELS) -> Tensor:
    fitted = attack.fit(oracle(model, threat), split(victim()), threat)
    return fitted(oracle(model, threat), *images(), threat)


def test_augmentation_is_the_formula_on_a_linear_substitute() -> None:
    model = victim()
    x, _ = images()
    labels = torch.arange(len(x)) % 3
    weight = model.weight.detach().float()[labels].view_as(x)
    for step in (0.1, -0.3):
        expected = (x + step * weight.sign()).clamp(0, 1)
        torch.testing.assert_close(augment(model, x, labels, step), expected)


def test_the_step_changes_its_sign_after_every_period() -> None:
    signs = [signed_step(0.1, augmentation, 2) for augmentation in range(6)]
    assert signs == [0.1, 0.1, -0.1, -0.1, 0.1, 0.1]
    assert [signed_step(-0.3, a, 1) for a in range(3)] == [-0.3, 0.3, -0.3]
    assert [signed_step(0.1, augmentation, None) for augmentation in range(9)] == [0.1] * 9


@pytest.mark.parametrize("doubling", [0, 2, 3, 9])
@pytest.mark.parametrize("reservoir", [1, 400])
def test_the_queries_are_those_of_the_paper(doubling: int, reservoir: int) -> None:
    """n * 2^sigma + kappa * (rho - sigma), with rho augmentations."""
    counts = new_points(100, 6, doubling_rounds=doubling, reservoir=reservoir, budget=10**6)
    full = min(doubling, 5)
    later = 5 - full
    if reservoir <= 100 * 2**full:  # else some rounds augment all there is
        assert sum(counts) == 100 * 2**full + reservoir * later
    assert counts[0] == 100
    assert all(count > 0 for count in counts)


def test_the_budget_cuts_the_last_augmentations() -> None:
    counts = new_points(150, 8, doubling_rounds=9, reservoir=1, budget=6400)
    assert counts == [150, 150, 300, 600, 1200, 2400, 1600, 0]
    assert new_points(150, 6, doubling_rounds=5, reservoir=400, budget=6400)[-1] == 2400


@pytest.mark.parametrize("budget", [12, 13, 20, 30, 48, 1000])
def test_queries_are_counted_where_the_victim_is(budget: int) -> None:
    counting = Counting(victim())
    watched = oracle(counting)
    data = split(victim(), 12)  # seeds only: nothing is left to measure on
    attack = Substitute(**SMALL, query_budget=budget).fit(watched, data, LABELS)
    expected = min(budget, 12 * 2**2)
    assert counting.images == attack.report(LABELS)["queries"] == watched.forward_passes == expected
    attack(watched, *images(), LABELS)
    assert counting.images == expected, "the victim was asked while the images were made"


def test_what_the_harness_measures_is_not_charged() -> None:
    counting = Counting(victim())
    watched = oracle(counting)
    report = Substitute(**SMALL).fit(watched, split(victim()), LABELS).report(LABELS)
    assert report["queries"] == watched.forward_passes == 48
    assert counting.images > 48
    assert report["held_out_images"] == 40 - 12
    assert report["agreement_with_victim"] == report["substitute_accuracy"]  # it is always right
    assert 0 <= report["transfer_rate"] <= 1


def test_measured_shares_are_those_of_the_images() -> None:
    """A victim that is always wrong: the substitute agrees with it, not with the labels."""
    model = victim()
    data = split(model, 400)
    relabelled = Split(data.images, (data.labels + 1) % 3, data.indices)
    settings = {**SMALL, "seeds": 200, "epochs": 30}
    report = Substitute(**settings).fit(oracle(model), relabelled, LABELS).report(LABELS)
    assert report["agreement_with_victim"] > report["substitute_accuracy"] + 0.2
    assert report["transfer_rate"] is None  # there is nothing the victim gets right


def test_labels_are_all_it_sees() -> None:
    attack = Substitute(**SMALL)
    expected = attacked(attack, victim())
    assert torch.equal(attacked(attack, Misleading(victim())), expected)
    gradients = ThreatModel(norm="linf", epsilon=0.2)
    assert torch.equal(attacked(attack, victim(), gradients), expected)


def test_the_victim_labels_the_seeds() -> None:
    """Not the true labels: a victim that always says 1 is copied."""
    stubborn = LinearVictim(torch.zeros(3, 64), torch.tensor([0.0, 5.0, 0.0]))
    attack = Substitute(**{**SMALL, "epochs": 20}).fit(oracle(stubborn), split(victim()), LABELS)
    with torch.no_grad():
        assert (attack.fitted.model(images()[0]).argmax(1) == 1).all()


def test_the_same_seed_gives_the_same_bytes_and_leaves_no_trace() -> None:
    attack = Substitute(**SMALL, seed=3)
    model = victim()
    model.train()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = attacked(attack, model)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert model.training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert attack.fitted is None
    torch.rand(7)
    with torch.no_grad():
        assert torch.equal(attacked(attack, model), first)
    assert not torch.equal(attacked(Substitute(**SMALL, seed=4), model), first)


def test_seeds_are_equally_many_of_each_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)
    order = stratified(labels, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(84))
    assert torch.bincount(labels[order[:12]]).tolist() == [4, 4, 4]
    assert torch.bincount(labels[order[:24]]).tolist() == [10, 10, 4]
    other = stratified(labels, torch.Generator().manual_seed(1))
    assert set(order[:12].tolist()) != set(other[:12].tolist())


def test_shifts_move_each_image_by_itself() -> None:
    x = torch.rand(60, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    moved = shifted(x, 1, torch.Generator().manual_seed(0))
    inside = x[:, :, 1:-1, 1:-1]
    found = set()
    for image, (down, right) in ((i, d) for i in range(60) for d in np.ndindex(3, 3)):
        if torch.equal(moved[image, :, down : down + 4, right : right + 3], inside[image]):
            found.add((image, (down, right)))
    assert len(found) == 60
    assert len({place for _, place in found}) == 9
    assert torch.equal(shifted(x, 0, torch.Generator()), x)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        *[({name: 0}, rf"attack\.{name}=0") for name in ("seeds", "rounds", "reservoir")],
        *[({name: 1.5}, rf"attack\.{name}=1.5") for name in ("epochs", "batch_size", "period")],
        *[({name: -1}, rf"attack\.{name}=-1") for name in ("doubling_rounds", "shift")],
        *[({"augmentation_step": value}, "that is not 0") for value in (0, 2, float("nan"))],
        ({"learning_rate": 0}, r"attack\.learning_rate=0"),
        ({"seeds": 150, "query_budget": 149}, r"query_budget=149 .* attack\.seeds=150"),
        ({"models": ()}, r"attack\.models"),
        ({"models": ("SmallCNN",)}, r"attack\.models"),
        ({"inner": "fgsm"}, r"attack\.inner is a str"),
        ({"inner": Momentum(target="next")}, r"attack\.inner\.target"),
    ],
)
def test_bad_values_are_named(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Substitute(**settings)


def test_the_number_of_seeds_is_checked_before_any_query() -> None:
    counting = Counting(victim())
    for seeds, complaint in (
        (2, "attack.seeds=2 .* 3 classes"),
        (41, "attack.seeds=41 .* 40 held"),
    ):
        with pytest.raises(UserError, match=complaint):
            Substitute(**{**SMALL, "seeds": seeds}).fit(oracle(counting), split(victim()), LABELS)
    assert counting.images == 0


def test_it_says_when_it_was_not_prepared() -> None:
    with pytest.raises(UserError, match="has no substitute yet"):
        Substitute()(victim(), *images(), LABELS)


def test_the_inner_attack_has_to_fit_the_threat_model() -> None:
    attack = Substitute(inner=PGD(steps=3))
    attack.require(LABELS)
    with pytest.raises(UserError, match=r"threat\.norm=l1"):
        attack.require(ThreatModel(norm="l1", epsilon=3, access="labels"))


@pytest.mark.slow
def test_digits_are_carried_over_from_few_labels(
    digits: Dataset, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    threat = ThreatModel(norm="linf", epsilon=0.3, access="labels")
    watched = oracle(digit_model, threat, 10)
    attack = Substitute(rounds=4, models=COMMITTEE[:1]).fit(watched, digits.validation, threat)
    assert attack.report(LABELS)["queries"] == watched.forward_passes == 1200
    x, y = (part[:500] for part in digit_images)
    assert accuracy(digit_model, attack(watched, x, y, threat), y) <= 0.1
    generator = torch.Generator().manual_seed(0)
    noise = (x + 0.3 * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    assert accuracy(digit_model, noise, y) > 0.8

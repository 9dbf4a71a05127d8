"""What holds for every training defense in conf/defense/, alone and under AWP."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract_parts import CONF, RECIPES, settings
from hydra import compose, initialize_config_dir
from torch import nn

from robustbench_local.building import build_defense
from robustbench_local.data import Dataset, Split
from robustbench_local.defenses import (
    AdversarialRecipe,
    AdversarialTraining,
    Defense,
    Recipe,
    Trades,
)
from robustbench_local.errors import UserError
from robustbench_local.identity import class_version
from robustbench_local.training import Schedule, Workshop, weights_key
from robustbench_local.training.identity import describe
from robustbench_local.training.step import Step

CPU = torch.device("cpu")
STACKS = [*RECIPES, "awp", *(f"{name},awp" for name in RECIPES)]


def defense_of(choice: str, *overrides: str) -> Defense:
    if not overrides:
        return build_defense(settings(*choice.split(",")))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build_defense(compose("config", [f"defense=[{choice}]", *overrides]).defense)


class Network(nn.Sequential):
    """Batch statistics, and no draws of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * 9 * 7, 3),
        )  # fmt: skip


def make_data(channels: int) -> Dataset:
    """Three classes of 9x7 images, a bright row each, under noise."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 3
        x = 0.3 + 0.15 * torch.randn(count, channels, 9, 7, generator=generator)
        x[torch.arange(count), :, 2 * labels + 1] += 0.5
        return Split((x.clamp(0, 1) * 255).to(torch.uint8), labels, torch.arange(count))

    return Dataset(
        name="rows", source="files", train=split(48), validation=split(30), test=split(30),
        class_names=("a", "b", "c"), test_total=30, fingerprint=f"rows-{channels}",
        test_fingerprint="rows", notes=(),
    )  # fmt: skip


def workshop_for(cache: Path, channels: int = 1) -> Workshop:
    return Workshop(
        data=make_data(channels), device=CPU, cache=cache, seed=5, model={"model": channels},
        schedule=Schedule(epochs=3, batch_size=16, learning_rate=0.01),
        build=lambda: Network(channels),
    )  # fmt: skip


def step(recipe, model, x, y, *, number=4, progress=0.7, seed=3):
    return recipe.loss(
        model, Step(x, y, criterion=F.cross_entropy, progress=progress, number=number, seed=seed)
    )


def test_all_that_the_suite_promises_is_here():
    assert set(RECIPES) >= {
        "adversarial_training", "augmentation", "distillation", "fast_adversarial_training",
        "free", "mart", "trades",
    }  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("choice", STACKS)
def test_a_step_gives_a_loss_and_changes_nothing_else(choice, channels, tmp_path):
    workshop = workshop_for(tmp_path, channels)
    recipe = defense_of(choice).training_recipe.prepare(workshop).begin()
    torch.manual_seed(0)
    model = Network(channels).train()
    model[1].eval()  # a frozen part stays frozen
    x, y = workshop.data.train.pixels(slice(0, 12)), workshop.data.train.labels[:12]
    before, state = x.clone(), torch.get_rng_state()
    loss, logits = step(recipe, model, x, y)
    assert loss.shape == () and loss.isfinite() and loss > 0
    assert logits.shape == (12, 3) and loss.dtype == logits.dtype == torch.float32
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model] == [True, False, True, True, True]
    assert model.training
    assert all(w.requires_grad and w.grad is None for w in model.parameters())
    loss.backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.parameters())
    assert torch.equal(x, before)


@pytest.mark.parametrize("choice", STACKS)
def test_a_step_depends_on_seed_and_number_and_not_on_the_mode(choice, tmp_path):
    workshop = workshop_for(tmp_path)
    recipe = defense_of(choice).training_recipe.prepare(workshop)
    torch.manual_seed(0)
    # In eval mode nothing moves, so that every look is at the same network.
    model, (x, y) = Network(1).eval(), batch(workshop.data)
    first, again, next_step, other_seed = (
        step(recipe.begin(), model, x, y, **which)[0].item()
        for which in ({}, {}, {"number": 5}, {"seed": 4})
    )
    assert first == again
    draws = choice.split(",")[0] not in ("awp", "distillation", "free")
    assert (next_step != first) is (other_seed != first) is draws


def batch(data: Dataset):
    return data.train.pixels(slice(0, 12)), data.train.labels[:12]


@pytest.mark.slow
@pytest.mark.parametrize("choice", [*RECIPES, "adversarial_training,awp", "free,awp"])
def test_a_training_stopped_in_the_middle_ends_with_the_same_bytes(choice, tmp_path, monkeypatch):
    def train(cache):
        workshop = workshop_for(cache)
        return workshop.classifier(defense_of(choice).training_recipe.prepare(workshop))

    whole = train(tmp_path / "whole")
    cls = type(defense_of(choice).training_recipe)
    original = cls.loss

    def stops(self, model, step):
        if step.number == 5:  # the last of the second epoch
            raise KeyboardInterrupt
        return original(self, model, step)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "loss", stops)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    assert list((tmp_path / "stopped" / "training").glob("*.pt"))
    resumed = train(tmp_path / "stopped")
    assert not resumed.cached and resumed.sha256 == whole.sha256
    assert len(resumed.history) == 3


@pytest.mark.parametrize("choice", STACKS)
def test_every_setting_is_in_the_key_of_the_weights(choice, tmp_path):
    recipe = defense_of(choice).training_recipe
    described = json.loads(json.dumps(describe(recipe), allow_nan=False))
    assert set(described) - {"", "code"} == {f.name for f in fields(recipe) if f.compare}
    workshop = workshop_for(tmp_path)

    def key(one):
        return weights_key(workshop.data, one, workshop.schedule, seed=0, key={"model": "x"})

    numbers = [f.name for f in fields(recipe) if isinstance(getattr(recipe, f.name), float)]
    for name in numbers:
        changed = replace(recipe, **{name: getattr(recipe, name) * 0.9 + 0.02})
        assert key(changed) != key(recipe), name
    # What is found on the way, a teacher or a perturbation, follows from the rest.
    assert key(recipe.prepare(workshop).begin()) == key(recipe)


def test_inherited_code_is_in_the_key_of_the_weights():
    described = describe(defense_of("trades").training_recipe)
    for base in (Trades, AdversarialTraining, AdversarialRecipe, Recipe):
        assert class_version(base) in described["code"]


@pytest.mark.parametrize("choice", RECIPES)
def test_the_training_budget_follows_the_dataset(choice):
    recipe = defense_of(choice, "dataset=cifar10").training_recipe
    attack = recipe.validation_attack()
    assert (attack is not None) is recipe.adversarial
    if attack is not None:
        assert attack[1].epsilon == 8 / 255 == recipe.threat.epsilon
        assert getattr(getattr(recipe, "attack", None), "steps", 10) == 10
        chosen = defense_of(choice, "train.threat.norm=l2", "train.threat.epsilon=1.5")
        assert chosen.training_recipe.validation_attack()[1].norm == "l2"


def test_two_recipes_are_both_named():
    with pytest.raises(UserError, match=r"trades, mart.*type defense=trades"):
        defense_of("trades,mart")


def test_names_are_those_of_the_files_recipe_first():
    assert defense_of("awp,trades").name == defense_of("trades,awp").name == "trades+awp"
    assert defense_of("awp").name == "awp"


@pytest.mark.slow
@pytest.mark.parametrize("choice", RECIPES)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_train_as_well(choice, norm, tmp_path):
    workshop = workshop_for(tmp_path)
    chosen = defense_of(choice, f"train.threat.norm={norm}", "train.threat.epsilon=1")
    recipe = chosen.training_recipe.prepare(workshop)
    trained = workshop.classifier(recipe)
    assert all(torch.isfinite(value).all() for value in trained.model.state_dict().values())

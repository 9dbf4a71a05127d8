"""What the training defenses are for, on real digits."""

from pathlib import Path

import pytest
import torch
from conftest import accuracy, digit_cnn, plain_pgd
from contract_parts import CONF
from hydra import compose, initialize_config_dir

from robustbench_local.building import build_defense
from robustbench_local.defenses import AugmentedTraining, Defense, Mixing, Recipe, Standard
from robustbench_local.training import Schedule, Trained, Workshop

pytestmark = pytest.mark.slow
SCHEDULE = Schedule(epochs=6, batch_size=64, learning_rate=0.005)


def defense_of(*choices: str) -> Defense:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [f"defense=[{','.join(choices)}]", "train.threat.epsilon=0.2"]
        return build_defense(compose("config", given).defense)


def train(digits, cache: Path, recipe: Recipe) -> Trained:
    workshop = Workshop(
        data=digits, device=torch.device("cpu"), cache=cache, seed=0, build=digit_cnn,
        model={"model": "digits"}, schedule=SCHEDULE,
    )  # fmt: skip
    return workshop.classifier(recipe.prepare(workshop))


def under_attack(model, digit_images) -> float:
    x, y = (part[:300] for part in digit_images)
    return accuracy(model, plain_pgd(model, x, y, epsilon=0.2, step=0.03, steps=20), y)


@pytest.mark.parametrize(
    "choices",
    [
        ("adversarial_training",), ("adversarial_training", "awp"), ("fast_adversarial_training",),
        ("free",), ("mart",), ("trades",),
    ],
    ids="+".join,
)  # fmt: skip
def test_trained_on_perturbed_images_most_digits_resist(choices, digits, digit_images, tmp_path):
    trained = train(digits, tmp_path, defense_of(*choices).training_recipe)
    x, y = digit_images
    assert accuracy(trained.model, x, y) > 0.85
    assert under_attack(trained.model, digit_images) > 0.55
    assert not any(told.startswith("catastrophic") for told in trained.warnings)


def test_an_undefended_network_does_not(digit_model, digit_images):
    assert under_attack(digit_model, digit_images) < 0.1


def noisy(x):
    return (x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def covered(x):
    return x.index_fill(2, torch.arange(9, 17), 0)


def shifted(x):
    return x.roll((3, 3), (2, 3))


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    return train(digits, tmp_path_factory.mktemp("plain"), Standard()).model


@pytest.mark.parametrize(
    ("recipe", "accident"),
    [
        (AugmentedTraining(noise=0.4), noisy),
        (AugmentedTraining(cutout=0.4), covered),
        (AugmentedTraining(mixing=Mixing(), consistency=12.0), shifted),
    ],
    ids=["noise", "cutout", "mixing"],
)
def test_each_augmentation_helps_against_its_own_accidents_and_no_attack(
    recipe, accident, digits, digit_images, plain, tmp_path
):
    x, y = digit_images
    trained = train(digits, tmp_path, recipe)
    assert accuracy(trained.model, x, y) > 0.93
    assert accuracy(trained.model, accident(x), y) > accuracy(plain, accident(x), y) + 0.06
    assert under_attack(trained.model, digit_images) < 0.3

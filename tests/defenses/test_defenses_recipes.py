from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch import nn

from robustbench_local.attacks import PGD, Attack
from robustbench_local.defenses import AdversarialTraining, Defense, Standard
from robustbench_local.errors import UserError
from robustbench_local.gradients import is_correct
from robustbench_local.threat import ThreatModel
from robustbench_local.training.step import Step

CONF = Path(__file__).parents[2] / "conf"
THREAT = ThreatModel(norm="linf", epsilon=0.4)
CALLS: list[tuple[float, int, bool]] = []


@dataclass(frozen=True, kw_only=True)
class Watching(Attack):
    """Notes what it is given, and blackens the image."""

    needs: ClassVar = "labels"
    norms: ClassVar = frozenset({"linf"})

    def run(self, model, x, y, threat):
        CALLS.append((threat.epsilon, self.seed, model.training))
        model(x + 5)
        return torch.zeros_like(x)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 1, 4, 4, generator=generator), torch.arange(12) % 3


def step(recipe, model, *, progress, number=7):
    x, y = batch()
    return recipe.loss(
        model, Step(x, y, criterion=F.cross_entropy, progress=progress, number=number, seed=3)
    )


def test_standard_is_cross_entropy():
    model, (x, y) = make_model(), batch()
    loss, logits = step(Standard(), model, progress=0.5)
    expected = -torch.log_softmax(logits, 1)[torch.arange(12), y].mean()
    assert torch.allclose(loss, expected)
    assert torch.equal(logits, model(x))


def test_epsilon_grows_linearly_over_the_ramp():
    CALLS.clear()
    recipe = AdversarialTraining(attack=Watching(), threat=THREAT, epsilon_ramp=0.5)
    for progress in (0.125, 0.25, 0.5, 0.99):
        step(recipe, make_model(), progress=progress)
    assert [epsilon for epsilon, _, _ in CALLS] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert [recipe.settled(p) for p in (0.0, 0.49, 0.5)] == [False, False, True]
    CALLS.clear()
    step(AdversarialTraining(attack=Watching(), threat=THREAT, epsilon_ramp=0.0), make_model(),
         progress=0.0)  # fmt: skip
    assert CALLS[0][0] == 0.4


def test_crafted_in_eval_mode_trained_in_train_mode():
    CALLS.clear()
    model = make_model()
    recipe = AdversarialTraining(attack=Watching(), threat=THREAT, epsilon_ramp=0.0)
    loss, logits = step(recipe, model, progress=0.5)
    assert CALLS[0][2] is False and model.training
    # One forward pass moved the batch statistics, that of the black images the loss is taken on.
    assert model[0].num_batches_tracked.item() == 1 and model[0].running_mean.item() == 0.0
    assert torch.allclose(logits, model[2].bias.expand(12, 3))
    loss.backward()
    assert model[2].bias.grad is not None


def test_the_draws_of_a_step_depend_on_seed_and_step():
    CALLS.clear()
    recipe = AdversarialTraining(attack=Watching(), threat=THREAT, epsilon_ramp=0.0)
    for number in (1, 2, 1):
        step(recipe, make_model(), progress=0.5, number=number)
    seeds = [seed for _, seed, _ in CALLS]
    assert seeds[0] == seeds[2] != seeds[1]


def test_the_training_images_are_within_the_budget_and_worse():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model().eval()

        def forward(self, x):
            if torch.is_grad_enabled() and not x.requires_grad:
                seen.append(x)
            return self.inner(x)

    attack = PGD(steps=3, step_size=0.5, early_stop=False, best_iterate=False)
    model, (x, y) = Spy(), batch()
    loss, _ = step(
        AdversarialTraining(attack=attack, threat=THREAT, epsilon_ramp=0.0), model, progress=0.0
    )
    (x_adv,) = seen
    THREAT.check(x_adv, x)
    assert loss > F.cross_entropy(model.inner(x), y)


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match=r"epsilon_ramp=1\.5"):
        AdversarialTraining(attack=PGD(), threat=THREAT, epsilon_ramp=1.5)
    with pytest.raises(UserError, match="l0"):
        AdversarialTraining(attack=PGD(), threat=ThreatModel(norm="l0", epsilon=3))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "main.yaml").write_text(
        "defaults: [_self_, {dataset: mnist}, {train: '${dataset}'}, {threat: '${dataset}_linf'},"
        " {defense: [none]}]\n"
    )
    # A wrap alone, as most files in conf/defense are.
    (tmp_path / "defense").mkdir()
    (tmp_path / "defense" / "rounding.yaml").write_text(
        "wrap:\n  rounding:\n    _target_: torch.nn.Identity\n"
    )
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield lambda *overrides: compose("main", [f"hydra.searchpath=[file://{CONF}]", *overrides])
    GlobalHydra.instance().clear()


def build(config) -> Defense:
    return Defense(**instantiate(config.defense, _convert_="object"))


@pytest.mark.parametrize("choice", ["adversarial_training", "[adversarial_training]"])
def test_adversarial_training_is_chosen_alone_or_in_a_list(config, choice):
    defense = build(config(f"defense={choice}"))
    assert defense.name == "adversarial_training"
    recipe = defense.training_recipe
    assert isinstance(recipe, AdversarialTraining)
    assert recipe.attack == PGD(steps=3, step_size=0.5, early_stop=False, best_iterate=False)
    assert recipe.threat == ThreatModel(norm="linf", epsilon=0.3)
    assert recipe.validation_attack() == (PGD(steps=10, step_size=0.25), recipe.threat)


def test_files_merge_in_a_list(config):
    assert build(config()).name == build(config("defense=none")).name == "none"
    both = build(config("defense=[adversarial_training,rounding]"))
    assert both.name == "adversarial_training+rounding"
    assert build(config("defense=[rounding]")).name == "rounding"
    assert build(config("defense=rounding")).training_recipe == Standard()


def test_the_training_budget_is_that_of_train(config):
    swept = build(config("defense=adversarial_training", "threat.epsilon=0.1"))
    assert swept.training_recipe.threat.epsilon == 0.3
    chosen = build(
        config("defense=adversarial_training", "dataset=cifar10", "train.threat.norm=l2")
    )
    assert chosen.training_recipe.threat == ThreatModel(norm="l2", epsilon=8 / 255)
    assert chosen.training_recipe.attack.steps == 10


def test_adversarial_training_of_a_toy_is_more_robust_than_standard():
    """Two features: a strong one the budget can undo, a weaker one it cannot."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    x = torch.full((400, 1, 1, 2), 0.5)
    x[:, 0, 0, 0] += (y * 2 - 1) * 0.05  # always right, but within reach of epsilon 0.1
    flipped = torch.rand(400, generator=generator) < 0.1
    x[:, 0, 0, 1] += (y * 2 - 1) * torch.where(flipped, -1, 1) * 0.2
    threat = ThreatModel(norm="linf", epsilon=0.1)
    robust = {}
    for recipe in (Standard(), AdversarialTraining(attack=PGD(steps=3, step_size=0.5),
                                                   threat=threat, epsilon_ramp=0.0)):  # fmt: skip
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        for number in range(400):
            optimizer.param_groups[0]["lr"] = 10 * (1 - number / 400)  # else it ends oscillating
            optimizer.zero_grad()
            loss, _ = recipe.loss(
                model, Step(x, y, criterion=F.cross_entropy, progress=0.5, number=number, seed=0)
            )
            loss.backward()
            optimizer.step()
        x_adv = PGD(steps=20)(model, x, y, threat)
        robust[type(recipe).__name__] = is_correct(model(x_adv), y).float().mean().item()
    assert robust["AdversarialTraining"] == pytest.approx(1 - flipped.float().mean().item())
    assert robust["Standard"] < robust["AdversarialTraining"] - 0.2

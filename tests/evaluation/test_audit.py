"""Looking at the victim: every flag is raised where its cause is planted, and only there."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional

from robustbench_local.attacks import PGD, AutoAttack, Noise, Square, TorchAttacks, Transfer
from robustbench_local.data import Dataset, Split
from robustbench_local.defenses import Preprocess, Wrapped
from robustbench_local.errors import UserError
from robustbench_local.evaluation import Audit, audit_victim, is_random
from robustbench_local.evaluation.audit import COSTLY, SEVERE, flags

CONF = Path(__file__).parents[2] / "conf"


def dataset(n=1000, source="files", labels=None):
    images = torch.randint(0, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 3 if labels is None else labels
    split = Split(images.to(torch.uint8), labels, torch.arange(n))
    return Dataset("toy", source, split, split, split, ("a", "b", "c"), n, "f", "t", ())


class Victim(nn.Module):
    """Linear logits, and whatever `change` makes of them; the module itself is its third word."""

    def __init__(self, change=lambda logits, x, self: logits):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.linear = nn.Linear(16, 3)
        self.change = change

    def forward(self, x):
        return self.change(self.linear(x.flatten(1)), x, self)


def optimising(logits, x, self):
    """A defense that looks for a better image while it answers."""
    with torch.enable_grad():
        moved = x.detach().requires_grad_()
        GRADIENT(self.linear(moved.flatten(1)).square().sum(), moved)
    return logits


GRADIENT = torch.autograd.grad  # under another name
FIRST = torch.eye(3)[0]

PLANTED = {
    "noisy logits": ("randomized", lambda logits, x, _: logits + 0.1 * torch.randn_like(logits)),
    "probabilities": ("softmax_output", lambda logits, x, _: logits.softmax(1)),
    "records gradients": ("gradient_switch", lambda logits, x, _: logits + FIRST * x.requires_grad),
    "gradients are on": (
        "gradient_switch",
        lambda logits, x, _: logits + FIRST * torch.is_grad_enabled(),
    ),
    "another in training": (
        "gradient_switch",
        lambda logits, x, self: logits if self.training else logits + FIRST,
    ),
    "optimises": ("gradient_switch", optimising),
    "constant gradient": ("zero_gradient", lambda logits, x, _: logits * 0 + logits.detach()),
    "without a graph": ("zero_gradient", lambda logits, x, _: logits.detach()),
    "temperature": ("zero_gradient", lambda logits, x, _: 1e5 * logits),
    "saturated": ("softmax_output zero_gradient", lambda logits, x, _: (1e5 * logits).softmax(1)),
    "rounded": (
        "zero_gradient",
        lambda logits, x, self: self.linear((8 * x).round().flatten(1) / 8),
    ),
}
MILD = {"softmax_output", "subset"}


def raised(victim, data=None, attack=None, **keywords):
    data = dataset() if data is None else data
    checks = audit_victim(victim, data, attack or PGD(), config=Audit(), **keywords)
    assert sorted(check.name for check in checks) == sorted(set(SEVERE) - {"eot_unstable", *COSTLY})
    assert all(check.why for check in checks)
    assert all(check.measured or check.name == "oblivious" for check in checks if check.raised)
    return {check.name: check for check in flags(checks)}


def test_a_plain_victim_on_the_full_test_set_has_no_flag_and_every_measurement():
    checks = audit_victim(Victim(), dataset(), PGD(), config=Audit())
    assert [check.raised for check in checks] == [False] * 6
    measured = {check.name: check.measured for check in checks}
    right = int(
        (Victim()(dataset().test.pixels(slice(256))).argmax(1) == torch.arange(256) % 3).sum()
    )
    assert measured["zero_gradient"] == {"attacked": right, "zero": 0, "zero_plain": 0}
    assert measured["randomized"]["fewest_correct"] == right
    assert measured["randomized"]["spread"] == 0
    assert measured["subset"] == {"n": 1000, "test_total": 1000}
    assert set(measured["gradient_switch"].values()) == {0}


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_cause(plant):
    names, change = PLANTED[plant]
    found = raised(Victim(change))
    assert " ".join(sorted(found)) == names
    for name, check in found.items():
        assert check.severe == (name not in MILD and plant != "temperature")


def test_saturation_is_severe_where_the_attack_climbs_plain_cross_entropy():
    """Ours climb its log-odds form and AutoAttack has other losses; see `attack_loss`."""
    victim = Victim(PLANTED["temperature"][1])
    assert raised(victim, attack=TorchAttacks(name="PGD"))["zero_gradient"].severe
    for attack in (PGD(loss="margin"), AutoAttack()):
        assert not raised(victim, attack=attack)["zero_gradient"].severe


def test_saturation_begins_where_float32_ends():
    """Below exp(-104) there is no float32, and below exp(-87) not everybody computes with it."""

    class Steep(nn.Module):
        def __init__(self, lead):
            super().__init__()
            self.lead = lead

        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return torch.stack([torch.full_like(mean, self.lead), mean - mean.detach()], 1)

    data = dataset(labels=torch.zeros(1000, dtype=torch.int64))
    assert raised(Steep(80), data) == {}
    assert set(raised(Steep(105), data)) == {"zero_gradient"}


def test_zero_gradients_count_for_images_that_are_attacked():
    """Images that are wrong from the start need no gradient."""

    def dead_where_bright(logits, x, self):
        bright = x.flatten(1).mean(1, keepdim=True) > 0.5
        return torch.where(bright, logits.detach(), logits)

    victim = Victim(dead_where_bright)
    x = dataset().test.pixels(slice(None))
    bright = x.flatten(1).mean(1) > 0.5
    predicted = victim(x).argmax(1)
    assert raised(victim, dataset(labels=torch.where(bright, (predicted + 1) % 3, predicted))) == {}
    check = raised(victim, dataset(labels=predicted))["zero_gradient"]
    assert check.measured["zero"] == int(bright[:256].sum())


def test_attacks_without_gradients_need_none():
    victim = Victim(PLANTED["rounded"][1])
    checks = audit_victim(victim, dataset(), Square(), config=Audit())
    (check,) = [check for check in checks if check.name == "zero_gradient"]
    assert (check.raised, check.why) == (None, "the attack needs scores only")


class Rejecting(Victim):
    """Answers with one logit more, a little below the largest."""

    abstains = True

    def forward(self, x):
        logits = super().forward(x)
        plain = Victim().linear(x.flatten(1))
        return torch.cat([logits, plain.amax(1, keepdim=True) - 9], 1)


def test_gradients_of_victims_that_may_reject():
    """What counts is the way out of being right or rejected, not the way into being rejected."""
    data = dataset(labels=Victim()(dataset().test.pixels(slice(None))).argmax(1))
    assert raised(Rejecting(), data) == {}
    assert set(raised(Rejecting(PLANTED["without a graph"][1]), data)) == {"zero_gradient"}


def test_probabilities_beside_a_logit_of_rejection():
    assert set(raised(Rejecting(PLANTED["probabilities"][1]))) == {"softmax_output"}


def test_randomised_victims_are_fine_under_eot_and_for_who_does_not_ask():
    noisy = Victim(PLANTED["noisy logits"][1])
    assert raised(noisy, attack=PGD(eot_samples=20)) == {}
    assert raised(noisy, attack=Transfer()) == {}
    assert is_random(noisy, dataset())
    assert not is_random(Victim(), dataset())


def test_a_prediction_that_changes_is_random_however_little_the_logits_do():
    class Tossing(nn.Module):
        """Two logits a hair apart, a coin says which is larger."""

        def forward(self, x):
            coin = torch.randint(0, 2, (len(x),)) * 2 - 1
            return torch.stack([1 + 1e-6 * coin, torch.ones(len(x)), torch.zeros(len(x))], 1)

    data = dataset(labels=torch.zeros(1000, dtype=torch.int64))
    assert is_random(Tossing(), data)


class Shaking(Preprocess):
    """Noise from a generator of its own; less of it where gradients are on, if it `cheats`."""

    randomized = True
    differentiable = True

    def __init__(self, cheats=False):
        super().__init__()
        self.cheats = cheats

    def transform(self, x):
        noise = torch.randn(x.shape, generator=self.generator(x.device))
        size = 0.1 if self.cheats and torch.is_grad_enabled() else 0.3
        return (x + size * noise).clamp(0, 1)


def test_a_switch_of_a_random_victim_is_told_from_chance():
    attack = PGD(eot_samples=20)
    assert raised(Wrapped(Shaking(), Victim()), attack=attack) == {}
    found = raised(Wrapped(Shaking(cheats=True), Victim()), attack=attack)
    assert set(found) == {"gradient_switch"}


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["python", "numpy"])
def test_a_victim_may_draw_from_any_global_generator(draw):
    victim = Victim(lambda logits, x, _: logits + draw())
    assert raised(victim, attack=PGD(eot_samples=20)) == {}


def unseedable():
    """Numbers from 0 to 1 that no seed decides; the first two are alike by chance."""
    numbers = itertools.cycle([0.2, 0.2, 0.9, 0.1, 0.6, 1.0, 0.4])
    return lambda: next(numbers)


def test_chance_that_nobody_can_seed_is_no_switch():
    draw = unseedable()

    def change(logits, x, _):
        return logits + FIRST * draw()

    check = switch_of(Victim(change))
    assert check.raised is None
    assert "could not be told from chance" in check.why


def switch_of(victim):
    return audit_by_name(victim, PGD(eot_samples=20))["gradient_switch"]


@pytest.mark.parametrize("when", ["grad_enabled", "requires_grad", "train_mode"])
def test_chance_that_nobody_can_seed_hides_no_switch(when):
    """However little of it: noise a thousandth of the switch made the check give up."""
    draw = unseedable()

    def change(logits, x, self):
        on = {
            "grad_enabled": torch.is_grad_enabled(),
            "requires_grad": x.requires_grad,
            "train_mode": self.training,
        }[when]
        return logits + FIRST * (draw() / 200 + 5 * on)

    check = switch_of(Victim(change))
    assert check.raised
    assert check.measured["same_seeds"] > 1e-4
    assert check.measured[when] > 100 * check.measured["same_seeds"]


def test_dropout_in_training_is_no_switch_beside_chance_that_nobody_can_seed():
    draw = unseedable()

    def change(logits, x, self):
        dropped = functional.dropout(logits, 0.5, self.training)
        return dropped + FIRST * draw() / 200

    assert switch_of(Victim(change)).raised is None


NORMAL = {
    "dropout": nn.Dropout(0.5),
    "batch norm": nn.BatchNorm1d(3),
    "dropout by hand": lambda logits, x, self: functional.dropout(logits, 0.5, self.training),
    "log-probabilities": lambda logits, x, _: logits.log_softmax(1),
    "more outputs in training": lambda logits, x, self: (logits, x) if self.training else logits,
}


@pytest.mark.parametrize("kind", NORMAL)
def test_what_networks_do_in_training_is_no_switch(kind):
    change = NORMAL[kind]
    victim = nn.Sequential(Victim(), change) if isinstance(change, nn.Module) else Victim(change)
    assert raised(victim) == {}


def test_a_part_that_rounds_has_a_surrogate():
    class Rounding(Preprocess):
        def transform(self, x):
            return (8 * x).round() / 8

    assert raised(Wrapped(Rounding(), Victim())) == {}


@pytest.mark.slow
@pytest.mark.parametrize("choice", [path.stem for path in (CONF / "model").glob("*.yaml")])
def test_no_network_of_ours_has_a_flag(choice):
    node = OmegaConf.load(CONF / "model" / f"{choice}.yaml")
    if OmegaConf.is_missing(node, "_target_"):
        return
    given = {key: node[key] for key in node if key not in ("checkpoint", "mean", "std")}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = instantiate(given, input_shape=(1, 28, 28), num_classes=3)
    images = torch.randint(0, 256, (1000, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    data = dataset()
    split = replace(data.test, images=images.to(torch.uint8))
    assert raised(network, replace(data, test=split), at_most=30) == {}


def test_the_look_leaves_nothing_changed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.seen += len(x)
            return x

    victim = nn.Sequential(Victim(), nn.BatchNorm1d(3), Counting())
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    states = random.getstate(), torch.get_rng_state(), torch.autograd._make_grads
    raised(victim)
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())
    assert all(module.training for module in victim.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in victim.parameters())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.autograd._make_grads is states[2]


def test_who_ignores_the_defense_is_oblivious():
    (check,) = raised(Victim(), awareness="oblivious").values()
    assert (check.name, check.severe) == ("oblivious", True)


@pytest.mark.parametrize(
    ("attack", "faced", "told"),
    [
        (PGD(), True, "one sample of them; type attack.eot_samples=20"),
        (Noise(), True, "type attack=standard where the threat model allows it"),
        (PGD(), False, "which the attack does not face"),
    ],
)
def test_randomness_is_flagged_where_the_attack_faces_it(attack, faced, told):
    victim = Victim(PLANTED["noisy logits"][1])
    checks = audit_victim(
        victim, dataset(), attack, config=Audit(), awareness="oblivious", faced_is_random=faced
    )
    (check,) = (check for check in checks if check.name == "randomized")
    assert check.raised is faced
    assert check.why.endswith(told)


@pytest.mark.parametrize(
    "data", [dataset(999), dataset(source="embedded"), replace(dataset(), test_total=2000)]
)
def test_subset(data):
    (check,) = raised(Victim(), data).values()
    assert (check.name, check.severe) == ("subset", False)


def audit_by_name(victim, attack):
    return {check.name: check for check in audit_victim(victim, dataset(), attack, config=Audit())}


def test_with_little_memory_fewer_images_are_looked_at():
    """A graph needs more of it than the forward passes that chose the batch size."""

    class Limited(Victim):
        def forward(self, x):
            if len(x) > (40 if x.requires_grad else 150):
                raise torch.OutOfMemoryError("no memory left")
            return super().forward(x)

    checks = audit_by_name(Limited(), PGD())
    assert {name for name, check in checks.items() if check.raised is not False} == set()
    right = int(
        (Victim()(dataset().test.pixels(slice(32))).argmax(1) == torch.arange(32) % 3).sum()
    )
    assert checks["zero_gradient"].measured["attacked"] == right
    assert not is_random(Limited(), dataset())


def test_a_look_that_breaks_down_is_skipped():
    class Brittle(Victim):
        def forward(self, x):
            if x.requires_grad:
                raise TypeError("numbers of NumPy only")
            return super().forward(x)

    checks = audit_by_name(Brittle(), Square())
    assert checks["gradient_switch"].raised is None
    assert checks["gradient_switch"].why == (
        "the check could not be made: TypeError numbers of NumPy only"
    )
    assert checks["randomized"].raised is False

    class Interrupted(Victim):
        def forward(self, x):
            if x.requires_grad:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        audit_victim(Interrupted(), dataset(), PGD(), config=Audit())


def test_at_most_so_many_images_are_looked_at():
    class Looking(Victim):
        most = 0

        def forward(self, x):
            self.most = max(self.most, len(x))
            return super().forward(x)

    victim = Looking()
    raised(victim, at_most=17)
    assert victim.most == 17


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"level": "thorough"}, "type audit=cheap or audit=full"),
        ({"sample": 0}, "whole number from 1: type audit.sample=10"),
        ({"passes": 1}, "whole number from 2"),
        ({"stray_images": -1}, "whole number from 0"),
        ({"spread": 2}, "audit.spread=2; expected a distance of unit vectors up to 0.1"),
        ({"points": math.nan}, "audit.points=nan; expected a number from 0"),
        ({"unbounded": [1.5]}, "up to 1: type audit.unbounded=[1,0.5]"),
        ({"epsilon_factors": 2}, "expected a list of numbers above 0"),
        ({"epsilon_factors": []}, "expected a list of numbers above 0"),
    ],
)
def test_bad_settings_are_told(settings, complaint):
    with pytest.raises(UserError) as caught:
        Audit(**settings)
    assert complaint in str(caught.value)
    assert f"audit.{next(iter(settings))}=" in str(caught.value)

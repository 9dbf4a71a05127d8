"""Classes of the user's own that do not fit: a sentence for what shows from outside, no more."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from robustbench_local.building import build, build_attack, build_defense
from robustbench_local.errors import UserError

OWN = """
import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from robustbench_local.attacks import Attack
from robustbench_local.defenses import Preprocess, Recipe

class Good(Recipe):
    adversarial = False
    def loss(self, network, now):
        logits = network(now.x)
        return now.criterion(logits, now.y), logits

@dataclass(frozen=True, kw_only=True)
class Strong(Good):
    strength: float

class Positional(Good):
    def __init__(self, strength):
        assert strength

class WithoutLoss(Recipe):
    adversarial = False

class ShortLoss(Good):
    def loss(self, model): ...

class LongPrepare(Good):
    def prepare(self, workshop, more): ...

class Unsaid(Recipe):
    def loss(self, model, step): ...

class Ambiguous(Good):
    def __init__(self): self.strength = undefined

class Choosy(Good):
    def __init__(self): raise ValueError("not today")

class Number(Good):
    loss = 3

class Ball(Attack):
    needs, norms = "gradients", frozenset({"linf"})
    def run(self, model, x, y, *others): return x

class ShortRun(Ball):
    def run(self, model, x, y): return x

class NoNeeds(Attack):
    def run(self, model, x, y, threat): return x

class WithoutRun(Attack):
    needs, norms = "gradients", frozenset({"linf"})

class Transform(Preprocess):
    def transform(self, x): return x

class ShortTransform(Preprocess):
    def transform(self): ...

class Unbuilt(Transform):
    def __init__(self): self.mine = 1

def seeded(method):
    @functools.wraps(method)
    def given(self, x):
        return method(self, x, self.generator(x.device))
    return given

class Wrapped(Preprocess):
    @seeded
    def transform(self, x, generator): return x

class Outer:
    class Inner(Ball): ...

class Undecorated(Ball):
    steps: int = 3

@dataclass(frozen=True)
class Circle(Good):
    itself: object = None
    def __post_init__(self): object.__setattr__(self, "itself", self)

class Failing(Transform):
    def __init__(self, levels=3): raise RuntimeError("real cause")

class Plain: ...

class Uncallable:
    def __call__(self): ...
"""

AS_RECIPE = "expected as in robustbench_local.defenses.recipe.Recipe"
AS_ATTACK = "expected as in robustbench_local.attacks.base.Attack"
AS_WRAP = "expected as in robustbench_local.defenses.preprocess.Preprocess"

PARTS = [
    ("recipe", "Strong", "strength is not given and own.Strong has no default for it; expected a "
     "value: type +defense.recipe.x.strength=VALUE"),
    ("recipe", "Positional", "type +defense.recipe.x.strength=VALUE"),
    ("recipe", "WithoutLoss", f"own.WithoutLoss has no loss; {AS_RECIPE}: type def loss(self, model"
     ", step): in its body"),
    ("recipe", "ShortLoss", f"own.ShortLoss.loss cannot be called with (model, step); {AS_RECIPE}: "
     "type def loss(self, model, step):"),
    ("recipe", "LongPrepare", "type def prepare(self, workshop):"),
    ("recipe", "Unsaid", f"own.Unsaid has no adversarial; {AS_RECIPE}: type adversarial = VALUE"),
    ("recipe", "Number", "type def loss(self, model, step):"),
    ("recipe", "Plain", "expected a configuration with _target_, a class derived from robustbench_l"
     "ocal.defenses.Recipe"),
    ("recipe", "Nope", "own.Nope cannot be found (own has no class Nope)"),
    ("wrap", "ShortTransform", f"cannot be called with (x); {AS_WRAP}: type def tran"
     "sform(self, x):"),
    ("wrap", "Unbuilt", "the constructor of own.Unbuilt leaves out that of Preprocess; expected it "
     "first: type super().__init__()"),
    ("wrap", "Plain", "derived from robustbench_local.defenses.Preprocess or called with a model"),
    ("wrap", "Uncallable", "or called with a model"),
]  # fmt: skip

ATTACKS = [
    ("own.ShortRun", f"own.ShortRun.run cannot be called with (model, x, y, threat); {AS_ATTACK}: "
     "type def run(self, model, x, y, threat):"),
    ("own.NoNeeds", f"own.NoNeeds has no needs; {AS_ATTACK}: type needs = VALUE in its body"),
    ("own.WithoutRun", f"own.WithoutRun has no run; {AS_ATTACK}"),
    ("own.Plain", "attack._target_=own.Plain makes no attack but Plain"),
    ("own.Nope", "type attack._target_=own.MyClass"),
    ("own", "(it is not of the form MODULE.CLASS)"),
    (".own.Ball", "(it is not of the form MODULE.CLASS)"),
    ("own.Outer.Nope", "own has no class Outer.Nope"),
    ("nowhere.Ball", "(there is no module nowhere); expected a class by its full name"),
    ("robustbench_local.attacks.PDG", "type attack._target_=robustbench_local.attacks.PGD"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own", None)


def defense(half, name):
    parts = {"recipe": {}, "regularize": {}, "wrap": {}} | {half: {"x": {"_target_": name}}}
    return build_defense(OmegaConf.create({"defense": parts}).defense)


@pytest.mark.parametrize(("half", "name", "told"), PARTS)
def test_a_part_of_a_defense_that_does_not_fit(half, name, told):
    with pytest.raises(UserError) as caught:
        defense(half, f"own.{name}")
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "told"), ATTACKS)
def test_an_attack_that_does_not_fit(name, told):
    with pytest.raises(UserError) as caught:
        build_attack({"attack": {"_target_": name}}, 1)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_keys_of_another_attack_are_told_with_where_to_put_ones_own():
    with pytest.raises(UserError, match=r"attack\.steps is not a key of own\.Ball; expected one of "
                       r"seed: type attack=mine --config-dir DIR"):  # fmt: skip
        build_attack({"attack": {"_target_": "own.Ball", "seed": 0, "steps": 3}}, 1)


def test_a_field_of_a_class_that_is_no_dataclass():
    with pytest.raises(UserError, match=r"type @dataclass\(frozen=True, kw_only=True\) above the"):
        build_attack({"attack": {"_target_": "own.Undecorated", "seed": 0, "steps": 3}}, 1)


@pytest.mark.parametrize("more", [{"_recursive_": False}, {"_args_": [3]}, {"_convert_": "all"}])
def test_keys_of_hydra_are_not_keys_of_the_class(more):
    node = OmegaConf.create({"defense": {"wrap": {"x": {"_target_": "own.Failing", **more}}}})
    with pytest.raises(RuntimeError, match="real cause"):
        build(node.defense.wrap)


def test_a_class_that_another_key_names():
    node = OmegaConf.create({"class": "own.Failing", "wrap": {"x": {"_target_": "${class}"}}})
    with pytest.raises(RuntimeError, match="real cause"):
        build(node.wrap)


def test_an_attack_inside_a_recipe_is_looked_at_too():
    parts = {
        "_target_": "robustbench_local.defenses.AdversarialTraining",
        "threat": {
            "_target_": "robustbench_local.threat.ThreatModel", "norm": "linf", "epsilon": 0.3
        },
        "attack": {"_target_": "own.ShortRun"},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"own\.ShortRun\.run cannot be called"):
        build(OmegaConf.create({"defense": {"recipe": {"x": parts}}}).defense.recipe)


def test_what_fits_is_built_whatever_its_names():
    assert defense("recipe", "own.Good").names == ["x"]
    assert defense("wrap", "own.Transform").faced == ["x"]
    assert build_attack({"attack": {"_target_": "own.Ball", "seed": 3}}, 1).seed == 3
    assert build_attack({"attack": {"_target_": "own.Outer.Inner", "seed": 3}}, 1).seed == 3
    assert defense("wrap", "own.Wrapped").faced == ["x"]
    assert defense("recipe", "own.Circle").names == ["x"]


def test_an_error_inside_a_constructor_stays_what_it_is():
    with pytest.raises(NameError, match="undefined"):
        defense("recipe", "own.Ambiguous")
    with pytest.raises(Exception, match="not today"):
        defense("recipe", "own.Choosy")
    Path(sys.path[0], "torn.py").write_text("import nothing_of_the_kind\nclass Ball: ...\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind"):
        build_attack({"attack": {"_target_": "torn.Ball"}}, 1)

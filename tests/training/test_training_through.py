"""Training a network behind a part of its defense."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn
from training_data import CPU, make_data, small_network

from robustbench_local.defenses import Defense, Preprocess, Recipe, Standard
from robustbench_local.defenses.defense import declared_samples
from robustbench_local.training import Schedule, Workshop, fit

SCHEDULE = Schedule(epochs=2, batch_size=16, learning_rate=0.01)


class Noise(Preprocess):
    randomized = True
    differentiable = True

    def transform(self, x):
        draw = torch.randn(x.shape, generator=self.generator(x.device), device=x.device)
        return (x + 0.2 * draw).clamp(0, 1)


def train(cache, through=None, key="plain", recipe=None):
    return fit(small_network, make_data(), recipe or Standard(), SCHEDULE, seed=1, device=CPU,
               cache=cache, key={"model": key}, through=through)  # fmt: skip


def test_the_weights_are_those_of_the_noisy_training_and_fit_the_bare_network(tmp_path):
    defense = Defense(wrap={"noise": Noise(in_training=True)})
    assert defense.trained_through == ["noise"]
    noisy = train(tmp_path, defense.through, "noisy")
    plain = train(tmp_path)
    assert noisy.sha256 != plain.sha256
    assert noisy.model.state_dict().keys() == plain.model.state_dict().keys()
    # The draws derive from the seed: the same training elsewhere ends with the same bytes.
    again = train(tmp_path / "elsewhere", defense.through, "noisy")
    assert not again.cached and again.sha256 == noisy.sha256


def test_a_part_that_is_not_in_training_leaves_the_weights_alone(tmp_path):
    defense = Defense(wrap={"noise": Noise()})
    assert train(tmp_path, defense.through, "through").sha256 == train(tmp_path).sha256


def test_a_part_may_be_left_out_at_run_time():
    x, network = torch.rand(4, 1, 8, 8), small_network().eval()
    trained_only = Defense(wrap={"noise": Noise(in_training=True, at_run_time=False)})
    assert trained_only.apply(network) is network
    assert trained_only.trained_through == ["noise"] and trained_only.faced == []
    victim = Defense(wrap={"noise": Noise()}).apply(network)
    assert not torch.equal(victim(x), victim(x))


def test_what_an_attacker_averages_is_what_the_most_random_part_declares():
    class Rare(Noise):
        eot_samples = 50

    network = small_network()
    assert declared_samples(network) == 20
    assert declared_samples(Defense(wrap={"a": Noise(), "b": Rare()}).apply(network)) == 50


@dataclass(frozen=True, kw_only=True)
class Taught(Recipe):
    """Learns the class after the one a teacher says, which `prepare` gets."""

    adversarial: ClassVar[bool] = False
    teachers: tuple[nn.Module, ...] = field(default=(), compare=False)

    def prepare(self, workshop):
        return replace(self, teachers=(workshop.classifier(Standard()).model,))

    def loss(self, model, step):
        logits = model(step.x)
        with torch.no_grad():
            said = (self.teachers[0](step.x).argmax(1) + 1) % 3
        return step.criterion(logits, said), logits


def test_a_workshop_trains_what_a_recipe_needs_first_through_the_cache(tmp_path):
    workshop = Workshop(
        data=make_data(), device=CPU, cache=tmp_path, seed=1, schedule=SCHEDULE,
        build=small_network, model={"model": "plain"},
    )  # fmt: skip
    teacher = Taught().prepare(workshop).teachers[0]
    known = train(tmp_path)  # the same weights, under the same key
    assert known.cached
    x = make_data().test.pixels(slice(None))
    assert torch.equal(teacher(x), known.model(x))
    # The teacher follows from the other parts of the key: it is no setting itself.
    taught = train(tmp_path, recipe=Taught().prepare(workshop), key="taught")
    assert train(tmp_path, recipe=Taught(), key="taught").cached
    assert taught.sha256 != known.sha256


def test_a_part_that_learns_is_fitted_to_the_network(tmp_path):
    class Shift(Preprocess):
        shift = 0.0

        def transform(self, x):
            return x + self.shift

        def fit(self, workshop):
            fitted = Shift()
            fitted.shift = float(workshop.data.train.pixels(slice(None)).mean())
            return fitted

    workshop = Workshop(
        data=make_data(), device=CPU, cache=tmp_path, seed=1, schedule=SCHEDULE,
        build=small_network, model={"model": "plain"},
    )  # fmt: skip
    defense = Defense(wrap={"shift": Shift()})
    fitted = defense.fit(workshop)
    assert defense.wrap["shift"].shift == 0 and 0.2 < fitted.wrap["shift"].shift < 0.5

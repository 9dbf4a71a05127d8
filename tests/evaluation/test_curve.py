"""A curve over epsilon holds what single runs at each epsilon would."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import LinearVictim

from robustbench_local.attacks import APGD, PGD, Attack, Cascade, Noise, Square
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.evaluation import Judging, evaluate, evaluate_curve
from robustbench_local.oracle import Oracle
from robustbench_local.threat import BudgetError, ThreatModel

RADII = [0.0, 0.02, 0.05, 0.15, 0.3]


def victim_and_split(n=60):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 16, generator=generator)
    model = LinearVictim(weight, torch.zeros(3))
    images = torch.randint(0, 256, (n, 1, 4, 4), generator=generator).to(torch.uint8)
    y = model(images.float() / 255).argmax(1)
    y[::7] = (y[::7] + 1) % 3
    return model, Split(images, y, torch.arange(n))


def curve(attack, norm="linf", radii=RADII, batch_size=25, access="gradients", randomized=False):
    model, split = victim_and_split()
    threat = ThreatModel(norm=norm, epsilon=radii[0], access=access)
    oracle = Oracle(model, threat, 3, randomized=randomized)
    return evaluate_curve(oracle, attack, split, radii, batch_size=batch_size), oracle


def single(attack, epsilon, norm="linf", access="gradients"):
    model, split = victim_and_split()
    oracle = Oracle(model, ThreatModel(norm=norm, epsilon=epsilon, access=access), 3)
    return evaluate(oracle, attack, split, batch_size=25)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "attack",
    [PGD(steps=4, restarts=2), Noise(samples=3), APGD(steps=9), Square(queries=30)],
    ids=lambda attack: type(attack).__name__,
)
def test_radii_attacked_at_once_give_what_each_gives_alone(attack, norm):
    scale = {"linf": 1, "l2": 4, "l1": 16}[norm]
    radii = [scale * radius for radius in RADII]
    points, oracle = curve(attack, norm, radii)
    passes = []
    for radius, point in zip(radii, points, strict=True):
        alone = single(attack, radius, norm)
        passes.append(alone.forward_passes)
        np.testing.assert_array_equal(point.examples.robust_correct, alone.examples.robust_correct)
        np.testing.assert_allclose(point.examples.size, alone.examples.size, atol=1e-6)
        assert (point.examples.size <= radius + 1e-6).all()
    # Radius 0 asks nothing, and the others share what they ask together.
    assert passes[0] == points[0].forward_passes == points[0].attack_seconds == 0
    assert [point.forward_passes for point in points[1:]] == pytest.approx(
        [np.mean(passes[1:])] * 4
    )
    attacked = points[0].examples.attacked.sum()
    assert oracle.forward_passes == pytest.approx(sum(passes) * attacked)
    assert [point.radii_at_once for point in points] == [1, 4, 4, 4, 4]


def test_the_curve_falls_and_starts_at_the_clean_accuracy():
    points, _ = curve(PGD(steps=10))
    accuracies = [point.examples.robust_correct.mean() for point in points]
    assert accuracies[0] == points[0].examples.clean_correct.mean()
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < accuracies[0]


class Step(Attack):
    """Moves every pixel by the radius, one radius at a time; counts its calls."""

    needs = "labels"
    norms = frozenset({"linf"})
    calls = 0

    def run(self, model, x, y, threat):
        type(self).calls += 1
        assert threat.radii is None
        return threat.project(x + threat.epsilon, x)


@dataclass(frozen=True, kw_only=True)
class Asks(Attack):
    """Asks once at a radius of 0.1, twice at 0.2, and may run out of memory there."""

    needs = "labels"
    norms = frozenset({"linf"})
    failures: list[Exception] = field(default_factory=list)

    def run(self, model, x, y, threat):
        if threat.epsilon > 0.15 and self.failures:
            raise self.failures.pop()
        for _ in range(round(threat.epsilon / 0.1)):
            model(x)
        return x.clone()


class Nearest(Attack):
    """Brightens by exactly 0.04, whatever epsilon is."""

    needs = "labels"
    norms = frozenset({"linf"})
    minimum_norm = True
    calls = 0

    def run(self, model, x, y, threat):
        type(self).calls += 1
        model(x)
        return (x + 0.04).clamp(max=1) if threat.epsilon >= 0.04 else x


def test_any_other_attack_meets_the_radii_one_after_the_other():
    Step.calls = 0
    points, _ = curve(Step(), radii=[0.1, 0.2], batch_size=1000)
    assert Step.calls == 2
    assert [point.examples.size.max() for point in points] == pytest.approx([0.1, 0.2])


def test_the_smallest_perturbation_gives_the_curve_in_one_pass():
    Nearest.calls = 0
    points, _ = curve(Nearest(), batch_size=1000)
    assert Nearest.calls == 1
    assert [(p.radii_at_once, p.forward_passes) for p in points] == [(5, 1.0)] * 5
    # Below its size the perturbation does not count, and the clean image stands.
    assert [round(float(p.examples.size.max()), 6) for p in points] == [0, 0, 0.04, 0.04, 0.04]
    clean = points[0].examples.clean_correct
    assert (points[1].examples.robust_correct == clean).all()
    changed = single(Nearest(), 0.3).examples.robust_correct
    for point in points[2:]:
        assert (point.examples.robust_correct == changed).all()


def test_of_a_random_victim_every_radius_is_the_run_it_would_be_alone():
    class Own(torch.nn.Module):
        """Draws from a generator of its own, as a defense does."""

        randomized = True

        def __init__(self, model):
            super().__init__()
            self.model, self.generator = model, torch.Generator()

        def forward(self, x):
            return self.model(x) + 0.1 * torch.randn(len(x), 3, generator=self.generator)

    def looks(radii):
        model, split = victim_and_split()
        model = Own(model)
        threat = ThreatModel(norm="linf", epsilon=radii[0])
        judging = Judging(draws=5, reseed=model.generator.manual_seed)
        attack = PGD(steps=4, eot_samples=2)
        points = evaluate_curve(
            Oracle(model, threat, 3), attack, split, radii, batch_size=25, judging=judging
        )
        return [point.examples.robust_correct for point in points]

    several = looks([0.02, 0.05, 0.15])
    for radius, point in zip([0.02, 0.05, 0.15], several, strict=True):
        np.testing.assert_array_equal(point, looks([radius])[0])


def test_the_least_likely_class_of_a_random_victim_is_refused():
    with pytest.raises(UserError, match="changes with every look"):
        curve(PGD(target="least_likely"), randomized=True)


def test_each_radius_has_the_costs_of_its_own_attack():
    points, _ = curve(Asks(), radii=[0.1, 0.2], batch_size=1000)
    assert [(p.radii_at_once, p.forward_passes) for p in points] == [(1, 1.0), (1, 2.0)]


def test_a_batch_that_ran_out_of_memory_is_counted_once():
    """The second radius fails once, when the first one is done."""
    cascade = Cascade(parts={"a": Asks(failures=[torch.OutOfMemoryError("full")])})
    points, _ = curve(cascade, radii=[0.1, 0.2], batch_size=1000)
    attacked = int(points[0].examples.attacked.sum())
    for radius, point, passes in zip((0.1, 0.2), points, (1.0, 2.0), strict=True):
        (line,) = cascade.report(ThreatModel(norm="linf", epsilon=radius))["parts"]
        assert line["attacked"] == attacked
        assert point.forward_passes == passes + 1  # and the look after it
        assert point.batch_size == 500


def test_one_image_at_many_radii_that_do_not_fit_are_told_as_such():
    radii = [0.1, 0.2, 0.3]

    class Full(PGD):
        def run(self, *given):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(UserError, match=r"one image alone at 3 radii .* fewer radii"):
        curve(Full(), radii=radii, batch_size=20)
    assert len(curve(PGD(steps=1), radii=radii, batch_size=1)[0]) == 3


def test_a_foul_at_one_radius_ends_the_curve():
    class Foul(Step):
        def run(self, model, x, y, threat):
            return (x + 0.15).clamp(max=1)

    with pytest.raises(BudgetError, match=r"exceeds epsilon 0\.1"):
        curve(Foul(), radii=[0.1, 0.2])

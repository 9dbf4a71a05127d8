"""A curve over epsilon holds what single runs at each epsilon would."""

import numpy as np
import pytest
import torch
from conftest import LinearVictim

from robustbench_local.attacks import PGD, Attack, Noise
from robustbench_local.data import Split
from robustbench_local.evaluation import evaluate, evaluate_curve
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


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [PGD(steps=4, restarts=2), Noise(samples=3)])
def test_radii_attacked_at_once_give_what_each_gives_alone(attack, norm):
    scale = {"linf": 1, "l2": 4, "l1": 16}[norm]
    radii = [scale * radius for radius in RADII]
    points, oracle = curve(attack, norm, radii)
    for radius, point in zip(radii, points, strict=True):
        alone = single(attack, radius, norm)
        np.testing.assert_array_equal(point.examples.robust_correct, alone.examples.robust_correct)
        np.testing.assert_allclose(point.examples.size, alone.examples.size, atol=1e-6)
        assert (point.examples.size <= radius + 1e-6).all()
    assert oracle.forward_passes == pytest.approx(
        sum(point.forward_passes * point.examples.attacked.sum() for point in points)
    )


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


class Nearest(Attack):
    """Brightens by exactly 0.04, whatever epsilon is."""

    needs = "labels"
    norms = frozenset({"linf"})
    minimum_norm = True
    calls = 0

    def run(self, model, x, y, threat):
        type(self).calls += 1
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
    # Below its size the perturbation does not count, and the clean image stands.
    assert [round(float(p.examples.size.max()), 6) for p in points] == [0, 0, 0.04, 0.04, 0.04]
    clean = points[0].examples.clean_correct
    assert (points[1].examples.robust_correct == clean).all()
    changed = single(Nearest(), 0.3).examples.robust_correct
    for point in points[2:]:
        assert (point.examples.robust_correct == changed).all()


def test_a_foul_at_one_radius_ends_the_curve():
    class Foul(Step):
        def run(self, model, x, y, threat):
            return (x + 0.15).clamp(max=1)

    with pytest.raises(BudgetError, match=r"exceeds epsilon 0\.1"):
        curve(Foul(), radii=[0.1, 0.2])

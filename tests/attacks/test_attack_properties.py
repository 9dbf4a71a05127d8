"""What must hold on a real network, whatever the numbers."""

from itertools import pairwise

import pytest
import torch
from conftest import Masked, accuracy, plain_pgd
from torch import Tensor, nn

from robustbench_local.attacks import PGD, Attack, Noise
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

RADII: dict[Norm, list[float]] = {
    "linf": [0.02, 0.05, 0.1, 0.15, 0.2, 0.3],
    "l2": [0.3, 0.7, 1, 1.5, 2, 3],
    "l1": [1, 3, 6, 10, 20, 40],
}
norms = pytest.mark.parametrize("norm", list(RADII))


def robust(
    model: nn.Module, images: tuple[Tensor, Tensor], attack: Attack, norm: Norm, epsilon: float
) -> float:
    x, y = images
    threat = ThreatModel(norm=norm, epsilon=epsilon)
    x_adv = attack(model, x, y, threat)
    threat.check(x_adv, x)
    return accuracy(model, x_adv, y)


@pytest.fixture(scope="module")
def some(digit_images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digit_images[0][:120], digit_images[1][:120]


def falls(values: list[float], slack: float = 0.0) -> bool:
    return all(after <= before + slack for before, after in pairwise(values))


@pytest.mark.slow
@norms
@pytest.mark.parametrize("attack", [PGD(steps=10, step_size=0.2), Noise()], ids=["pgd", "noise"])
def test_robust_accuracy_falls_with_epsilon(
    attack: Attack, norm: Norm, digit_model: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    clean = accuracy(digit_model, *some)
    values = [robust(digit_model, some, attack, norm, epsilon) for epsilon in RADII[norm]]
    # Noise is drawn anew at each radius, so one image of 120 may come back.
    assert falls([clean, *values], slack=0.009 if isinstance(attack, Noise) else 0)
    if isinstance(attack, PGD):
        assert values[0] > values[-1] + 0.5


@pytest.mark.slow
@norms
def test_robust_accuracy_falls_with_steps(
    norm: Norm, digit_model: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    values = [
        robust(digit_model, some, PGD(steps=steps), norm, RADII[norm][2])
        for steps in (1, 5, 10, 20, 40)
    ]
    assert values[0] > values[-1]
    # Under l1 the number of pixels moved at once depends on how many steps there are.
    assert falls(values, slack=0.01 if norm == "l1" else 0)


@norms
def test_robust_accuracy_falls_with_restarts(
    norm: Norm, digit_model: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    """With the same seed the first restarts are the same: what is broken stays broken."""
    x, y = some
    threat = ThreatModel(norm=norm, epsilon=RADII[norm][2])
    broken = []
    for restarts in (1, 2, 5):
        x_adv = PGD(steps=5, step_size=0.4, restarts=restarts)(digit_model, x, y, threat)
        with torch.no_grad():
            broken.append(digit_model(x_adv).argmax(1) != y)
    assert (broken[0] <= broken[1]).all()
    assert (broken[1] <= broken[2]).all()


@pytest.mark.parametrize("epsilon", [0.5, 0.7, 1])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_large_epsilon_leaves_nothing(
    epsilon: float, early_stop: bool, digit_model: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    assert robust(digit_model, some, PGD(early_stop=early_stop), "linf", epsilon) == 0


@pytest.mark.slow
@norms
def test_switches_only_make_it_stronger(
    norm: Norm, digit_model: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    """The same start and steps; the paper's attack is the one with both switches off."""
    found = {}
    for early_stop in (False, True):
        for best_iterate in (False, True):
            attack = PGD(steps=15, step_size=0.3, early_stop=early_stop, best_iterate=best_iterate)
            x_adv = attack(
                digit_model, some[0], some[1], ThreatModel(norm=norm, epsilon=RADII[norm][2])
            )
            with torch.no_grad():
                found[early_stop, best_iterate] = digit_model(x_adv).argmax(1) != some[1]
    for switches in ((True, False), (False, True), (True, True)):
        assert (found[False, False] <= found[switches]).all()
    assert torch.equal(found[True, True], found[False, True])
    assert torch.equal(found[True, True], found[True, False])


@norms
def test_pgd_is_stronger_than_fgsm_and_noise(
    norm: Norm, digit_model: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    epsilon = RADII[norm][3]
    fgsm = PGD(steps=1, step_size=1, random_start=False, early_stop=False, best_iterate=False)
    strength = [robust(digit_model, some, a, norm, epsilon) for a in (Noise(), fgsm, PGD())]
    assert strength[0] > strength[1] > strength[2]


def test_masked_gradients_leave_noise_only(
    digit_model: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    """No gradient, no climb: PGD then is its own random start, and doesn't pretend to be more."""
    x, y = some
    masked = Masked(digit_model)
    threat = ThreatModel(norm="linf", epsilon=0.2)
    x_adv = PGD(steps=5)(masked, x, y, threat)
    threat.check(x_adv, x)
    through = PGD(steps=20)(digit_model, x, y, threat)
    assert accuracy(masked, x_adv, y) > 0.8 > 0.3 > accuracy(masked, through, y)


@pytest.mark.slow
def test_a_robust_network_stays_robust(
    robust_digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """Robust accuracy is neither lost nor won against a plain loop of 100 steps."""
    x, y = digit_images
    plain = accuracy(
        robust_digit_model,
        plain_pgd(robust_digit_model, x, y, epsilon=0.3, step=0.01, steps=100),
        y,
    )
    mine = robust(robust_digit_model, digit_images, PGD(steps=100), "linf", 0.3)
    assert plain - 0.03 <= mine <= plain + 0.002


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_more_steps_and_restarts_change_little(
    norm: Norm, robust_digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """The default is not far from what ten times the work finds."""
    some = digit_images[0][:200], digit_images[1][:200]
    epsilon = {"linf": 0.3, "l2": 2, "l1": 10}[norm]
    default = robust(robust_digit_model, some, PGD(), norm, epsilon)
    thorough = robust(robust_digit_model, some, PGD(steps=100, restarts=4), norm, epsilon)
    assert thorough <= default <= thorough + 0.06


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (255 * x, y), r"pixels from .* divide by 255"),
        (lambda x, y: (x - 0.5, y), "pixels from -"),
        (lambda x, y: (x / 0, y), "pixels from"),
        (lambda x, y: ((255 * x).byte(), y), r"uint8 .* type x\.float\(\) / 255"),
        (lambda x, y: (x[0], y), "expected float32 of shape"),
        (lambda x, y: (x, y.float()), r"labels are torch\.float32 .* type y\.long\(\)"),
        (lambda x, y: (x, y[:2]), r"labels are torch\.int64 of shape \(2,\)"),
    ],
)
def test_images_and_labels_that_are_none_are_told_before_anything_is_asked(change, said):
    class Never(torch.nn.Module):
        def forward(self, x):
            raise AssertionError("asked")

    x, y = torch.rand(3, 1, 4, 4).clamp(0.1, 0.9), torch.tensor([0, 1, 0])
    with pytest.raises(UserError, match=said):
        PGD()(Never(), *change(x, y), ThreatModel(norm="linf", epsilon=0.1))

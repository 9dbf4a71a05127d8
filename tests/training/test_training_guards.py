import pytest
import torch
from torch import nn
from training_data import CPU, embedded_mnist, make_data

from robustbench_local.attacks import PGD
from robustbench_local.defenses import AdversarialTraining, Standard
from robustbench_local.gradients import is_correct
from robustbench_local.models import Normalized, SmallCNN
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, fit
from robustbench_local.training.course import Course
from robustbench_local.training.guards import find_warnings

ROWS = AdversarialTraining(
    attack=PGD(steps=1), threat=ThreatModel(norm="linf", epsilon=0.1), epsilon_ramp=0.0
)


class Constant(nn.Module):
    """Names one class whatever it sees: robust on a third of the rows."""

    def forward(self, x):
        return (
            torch.nn.functional.one_hot(torch.zeros(len(x)).long(), 3)
            + 0 * x.mean((1, 2, 3))[:, None]
        )


def warn(recipe, *entries, model=None):
    course = Course()
    for number, (train, clean, robust) in enumerate(entries):
        one = {"epoch": number + 1, "train_accuracy": train, "validation_accuracy": clean,
               "robust_validation_accuracy": robust, "settled": True, "seconds": 1.0}  # fmt: skip
        course.add(one, nn.Linear(1, 1))
    told = find_warnings(model or Constant(), make_data(), recipe, course)
    return [sentence.split(":")[0] for sentence in told], told


def test_nothing_to_warn_of():
    assert warn(Standard(), (0.99, 0.95, None)) == ([], ())
    assert warn(ROWS, (0.9, 0.95, 0.7), (0.9, 0.95, 0.75)) == ([], ())


def test_validation_at_chance_names_the_numbers():
    ids, told = warn(Standard(), (0.4, 0.35, None))
    assert ids == ["validation_at_chance"]
    assert "35.0%" in told[0] and "33.3%" in told[0] and "60 images" in told[0]


def test_a_fall_of_robust_accuracy():
    ids, told = warn(ROWS, (0.7, 0.95, 0.6), (0.7, 0.95, 0.65), (0.4, 0.95, 0.3))
    assert ids == ["catastrophic_overfitting"]
    assert "65.0% to 30.0% in epoch 3" in told[0] and "epoch 2 was selected" in told[0]


def test_a_fall_over_several_epochs_counts_from_the_best():
    ids, told = warn(ROWS, (0.7, 0.95, 0.65), (0.7, 0.95, 0.6), (0.7, 0.95, 0.52), (0.6, 0.95, 0.4))
    assert ids == ["catastrophic_overfitting"] and "65.0% to 40.0% in epoch 4" in told[0]
    assert warn(ROWS, (0.7, 0.95, 0.65), (0.7, 0.95, 0.55), (0.7, 0.95, 0.46)) == ([], ())


def test_a_weak_training_attack_is_told_from_memorised_images():
    # The constant model keeps a third of the training images under any attack.
    ids, told = warn(ROWS, (0.9, 0.95, 0.1))
    assert ids == ["catastrophic_overfitting"] and "33.3%" in told[0]
    ids, _ = warn(ROWS, (0.5, 0.95, 0.1))
    assert ids == ["robust_overfitting"]


@pytest.mark.slow
def test_real_digits_one_step_training_is_caught_and_proper_training_is_not(tmp_path):
    data = embedded_mnist()
    threat = ThreatModel(norm="linf", epsilon=0.3)
    one_step = PGD(steps=1, step_size=1.0, random_start=False, early_stop=False, best_iterate=False)
    proper = PGD(steps=3, step_size=0.5, early_stop=False, best_iterate=False)

    def train(attack, ramp):
        torch.manual_seed(0)
        return fit(
            lambda: Normalized(
                SmallCNN(input_shape=(1, 28, 28), num_classes=10, width=8, hidden=50),
                [0.1307],
                [0.3081],
                channels=1,
            ),
            data,
            AdversarialTraining(attack=attack, threat=threat, epsilon_ramp=ramp),
            Schedule(epochs=6, batch_size=128, learning_rate=0.005, min_steps=700),
            seed=0,
            device=CPU,
            cache=tmp_path,
            key={"model": "cnn"},
        )

    x, y = data.test.pixels(slice(0, 300)), data.test.labels[:300]
    weak, strong = train(one_step, 0.0), train(proper, 0.5)
    assert weak.history[-1]["train_accuracy"] > 0.8  # its own attack sees nothing wrong
    x_adv = PGD(steps=20, step_size=0.1)(weak.model, x, y, threat)
    assert is_correct(weak.model(x_adv), y).float().mean() < 0.3
    assert any(told.startswith("catastrophic_overfitting: ") for told in weak.warnings)
    x_adv = PGD(steps=20, step_size=0.1)(strong.model, x, y, threat)
    assert is_correct(strong.model(x_adv), y).float().mean() > 0.6
    assert not any(told.startswith("catastrophic") for told in strong.warnings)

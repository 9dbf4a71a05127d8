"""Schedule, augmentation, average, progress: each against an independent answer."""

import io
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from robustbench_local.errors import UserError
from robustbench_local.training import Schedule
from robustbench_local.training.augmentation import PAD, augment
from robustbench_local.training.averaging import Average
from robustbench_local.training.progress import epoch_bar

CONF = Path(__file__).parents[2] / "conf" / "train"


def schedule(**changes) -> Schedule:
    return Schedule(**{"epochs": 10, "batch_size": 128, "learning_rate": 0.5, **changes})


def test_one_cycle_endpoints():
    one = schedule(schedule="one_cycle", warmup=0.4)
    assert one.rate(0.0) == pytest.approx(0.5 / 25)
    assert one.rate(0.2) == pytest.approx(0.5 * (1 + 1 / 25) / 2)  # half of a straight line
    assert one.rate(0.4) == 0.5
    assert one.rate(0.7) == pytest.approx(0.25)  # half of a cosine
    assert one.rate(1.0) == pytest.approx(0.0, abs=1e-12)
    assert schedule(warmup=0.0).rate(0.0) == 0.5


def test_cosine_and_step_endpoints():
    cosine = schedule(schedule="cosine")
    assert [cosine.rate(p) for p in (0, 0.5, 1)] == pytest.approx([0.5, 0.25, 0.0])
    step = schedule(schedule="step", milestones=[0.5, 0.75])
    rates = [step.rate(p) for p in (0, 0.4999, 0.5, 0.75, 0.9)]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.005, 0.005])


def test_small_sets_are_passed_over_until_min_steps():
    plan = schedule(min_steps=1500).plan(3800)
    assert (plan.batches, plan.batch_size, plan.passes) == (3800 // 128, 128, 6)
    assert plan.total == 10 * 6 * 29 >= 1500 > 10 * 5 * 29
    assert schedule(min_steps=1500).plan(60000).total == 10 * 468
    assert schedule().plan(7).batch_size == 7


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_is_a_schedule_with_a_budget_beside_it(path):
    config = yaml.safe_load(path.read_text())
    read = Schedule.from_config(config)
    assert read.epochs == config["epochs"]
    assert {"threat", "adversarial_steps", "adversarial_step_size"} < set(config)
    stronger = {**config, "threat": {"norm": "l2", "epsilon": 9}, "adversarial_steps": 99}
    assert Schedule.from_config(stronger) == read


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "train.epochs=0"),
        ({"learning_rate": -1.0}, "train.learning_rate=-1.0"),
        ({"optimizer": "adam"}, "adamw, sgd"),
        ({"average_decay": 1.0}, "train.average_decay=1.0"),
        ({"milestones": [2]}, "train.milestones"),
        ({"learning_rat": 1}, "train.learning_rat is unknown"),
        ({"learning_rate": "fast"}, "train.learning_rate=fast; expected a number"),
        ({"epochs": True}, "train.epochs=True; expected a whole number"),
        ({"mixed_precision": "no"}, "train.mixed_precision=no; expected true or false"),
    ],
)
def test_wrong_values_are_told(changes, words):
    config = {"epochs": 1, "batch_size": 1, "learning_rate": 1.0, **changes}
    with pytest.raises(UserError, match=words):
        Schedule.from_config(config)


def test_a_missing_key_is_told():
    with pytest.raises(UserError, match="learning_rate"):
        Schedule.from_config({"epochs": 1, "batch_size": 1})


def test_shift_and_flip_keep_the_pixels_of_an_image_with_a_margin():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(200, 3, 16, 16)
    x[:, :, PAD:-PAD, PAD:-PAD] = torch.rand(3, 8, 8, generator=generator)
    out = augment(x, "crop_flip", generator)
    assert out.shape == x.shape
    assert torch.equal(out.flatten(1).sort(1).values, x.flatten(1).sort(1).values)


def test_every_result_is_one_of_the_crops_and_each_is_as_likely():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 6, 7, generator=generator)
    padded = torch.nn.functional.pad(image, (PAD,) * 4)
    crops = {}
    for top in range(2 * PAD + 1):
        for left in range(2 * PAD + 1):
            crop = padded[:, top : top + 6, left : left + 7]
            crops[crop.numpy().tobytes()] = (top, left, False)
            crops[crop.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    assert len(crops) == 162
    out = augment(image.expand(16200, 2, 6, 7), "crop_flip", generator).contiguous()
    seen = Counter(crops[one.numpy().tobytes()] for one in out)
    assert len(seen) == 162
    # 100 expected each, standard deviation 10.
    assert min(seen.values()) > 50 and max(seen.values()) < 150


def test_no_augmentation_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    x = torch.rand(2, 1, 4, 4)
    assert augment(x, "none", generator) is x
    assert torch.equal(before, generator.get_state())


def test_average_in_closed_form():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    average = Average(model, 0.5)
    expected = 1.0
    for t, value in enumerate([3.0, -2.0, 5.0, 0.5, 7.0, 11.0, 2.0, 1.0, 4.0, 6.0]):
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[1].running_mean.fill_(value)
            model[1].num_batches_tracked.fill_(t)
        average.update(model)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
        assert average.model[0].weight.item() == pytest.approx(expected, rel=1e-6)
        assert average.model[1].num_batches_tracked.item() == t
    assert average.model[1].running_mean.item() != pytest.approx(6.0)
    assert math.isclose(model[0].weight.item(), 6.0)
    assert all(not weight.requires_grad for weight in average.model.parameters())


def test_without_decay_the_average_is_the_model():
    model = nn.Linear(1, 1)
    average = Average(model, None)
    average.update(model)
    assert average.model is model


def test_progress_is_shown_on_a_terminal_only():
    for terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=100)
        with epoch_bar(console, 2, 2, 10) as report:
            report(10, 0.25, 0.5)
        assert ("loss 0.250, accuracy 50.0%" in text.getvalue()) is terminal
        assert terminal or text.getvalue() == ""
    with epoch_bar(None, 1, 1, 1) as report:
        report(1, 0.0, 0.0)

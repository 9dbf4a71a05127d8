"""When a training ends, and which images its steps see."""

from dataclasses import dataclass, replace

import pytest
import torch
from training_data import CPU, make_data, small_network

from robustbench_local.defenses import Standard
from robustbench_local.errors import UserError
from robustbench_local.training import Schedule, fit
from robustbench_local.training.course import Course

SEEN: list[torch.Tensor] = []


def run(cache, recipe, schedule, data=None):
    return fit(small_network, data or make_data(), recipe, schedule, seed=1, device=CPU,
               cache=cache, key={"model": "small"})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unlearning(Standard):
    """Learns wrong classes after a third."""

    def loss(self, model, step):
        y = step.y if step.progress < 0.3 else (step.y + 1) % 3
        return super().loss(model, replace(step, y=y))


LONG = Schedule(epochs=10, batch_size=16, learning_rate=0.05, schedule="step", milestones=())


def test_training_ends_after_so_many_epochs_without_a_better_one(tmp_path):
    whole = run(tmp_path, Unlearning(), LONG)
    assert len(whole.history) == 10 and whole.epoch <= 4
    patient = run(tmp_path, Unlearning(), replace(LONG, patience=2))
    assert len(patient.history) == patient.epoch + 2
    # What happened until then is what happens without; the epoch that is kept is the best of it.
    timeless = [{**e, "seconds": 0} for e in whole.history]
    assert [{**e, "seconds": 0} for e in patient.history] == timeless[: len(patient.history)]
    scores = [entry["validation_accuracy"] for entry in patient.history]
    assert scores[patient.epoch - 1] == max(scores) == patient.validation["validation_accuracy"]


def test_a_training_that_had_ended_goes_no_further_after_a_kill(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    schedule = replace(LONG, patience=2)
    whole = run(tmp_path / "whole", Unlearning(), schedule)
    with monkeypatch.context() as patch:
        patch.setitem(fit.__globals__, "find_warnings", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", Unlearning(), schedule)
    resumed = run(tmp_path / "killed", Unlearning(), schedule)
    assert resumed.sha256 == whole.sha256 and len(resumed.history) == len(whole.history)


def test_epochs_of_the_warm_up_cost_no_patience():
    course = Course()
    model = torch.nn.Linear(1, 1)

    def add(robust, settled):
        number = course.epoch + 1
        entry = {"epoch": number, "validation_accuracy": 0.9, "settled": settled,
                 "robust_validation_accuracy": robust, "seconds": 1.0}  # fmt: skip
        course.add(entry, model)
        return course.over(10, 2)

    assert [add(0.3, False), add(0.2, False), add(0.1, False)] == [False] * 3
    assert [add(0.2, True), add(0.6, True)] == [False] * 2  # a better one came
    assert [add(0.5, True), add(0.59, True)] == [False, True]
    assert not course.over(8, None) and course.over(7, None)


@pytest.mark.parametrize(("value", "told"), [(0, "null or 1 or more"), (1.5, "a whole number")])
def test_patience_is_a_number_of_epochs(value, told):
    with pytest.raises(UserError, match=rf"train\.patience={value}; expected {told}"):
        Schedule(epochs=1, batch_size=1, learning_rate=0.1, patience=value)


@dataclass(frozen=True, kw_only=True)
class Watching(Standard):
    """Notes the images of every step."""

    replays: int = 1

    def loss(self, model, step):
        SEEN.append(step.x.clone())
        return super().loss(model, step)


def watch(cache, replays, **settings):
    SEEN.clear()
    schedule = Schedule(epochs=4, batch_size=16, learning_rate=0.01, **settings)
    run(cache, Watching(replays=replays), schedule)
    return list(SEEN)


@pytest.mark.parametrize("replays", [2, 4, 5])
def test_a_minibatch_is_replayed_in_the_natural_order_as_many_steps_in_all(tmp_path, replays):
    natural = watch(tmp_path, 1)
    slow = watch(tmp_path, replays)
    assert len(slow) == len(natural) == 24  # 96 images in batches of 16, 4 epochs
    assert all(
        torch.equal(x, natural[step // replays]) for step, x in enumerate(slow)
    )  # also where an epoch ends between two replays
    if replays == 4:  # then 4 epochs see every image once
        once = torch.cat(slow[::4]).flatten(1).sum(1).sort().values
        everything = make_data().train.pixels(slice(None)).flatten(1).sum(1).sort().values
        assert torch.equal(once, everything)


def test_replays_see_the_same_augmentation(tmp_path):
    seen = watch(tmp_path, 3, augmentation="crop_flip")
    plain = watch(tmp_path, 3)
    for step in range(0, 24, 3):
        assert torch.equal(seen[step], seen[step + 1])
        assert torch.equal(seen[step], seen[step + 2])
        assert not torch.equal(seen[step], plain[step])

import ast
import json
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_data import CPU, linear_network, make_data, small_network, weights_of

from robustbench_local.attacks import PGD
from robustbench_local.data import Split
from robustbench_local.defenses import AdversarialTraining, Standard
from robustbench_local.errors import UserError
from robustbench_local.identity import PACKAGE
from robustbench_local.models import Normalized
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, TrainingDiverged, fit, weights_key
from robustbench_local.training.course import Course
from robustbench_local.training.validation import correct_images

SCHEDULE = Schedule(epochs=2, batch_size=16, learning_rate=0.01)
KEY = {"model": "test"}


def run(cache, *, build=small_network, data=None, recipe=None, schedule=SCHEDULE, seed=0):
    return fit(
        build,
        data or make_data(),
        recipe or Standard(),
        schedule,
        seed=seed,
        device=CPU,
        cache=cache,
        key=KEY,
    )


def adversarial(*, epsilon: float = 0.1, ramp: float = 0.0) -> AdversarialTraining:
    return AdversarialTraining(
        attack=PGD(steps=2, step_size=0.5, early_stop=False, best_iterate=False),
        threat=ThreatModel(norm="linf", epsilon=epsilon),
        epsilon_ramp=ramp,
    )


def test_training_learns_and_is_cached(tmp_path):
    first = run(tmp_path)
    assert first.validation["validation_accuracy"] > 0.95
    assert first.warnings == () and not first.cached and first.device == "cpu"
    second = run(tmp_path)
    assert second.cached
    assert (second.sha256, second.seconds, second.history) == (
        first.sha256,
        first.seconds,
        first.history,
    )
    x = make_data().test.pixels(slice(None))
    assert torch.equal(first.model(x), second.model(x))  # to the last bit
    assert not first.model.training
    assert {path.name for path in tmp_path.glob("*/*")} == {
        f"{first.key}{end}" for end in (".safetensors", ".json", ".log")
    }


def test_recorded_accuracy_is_that_of_the_stored_weights(tmp_path):
    data = make_data(noise=0.6)
    trained = run(tmp_path, data=data, schedule=replace(SCHEDULE, average_decay=0.8))
    accuracy = correct_images(trained.model, data.validation).double().mean()
    assert accuracy == pytest.approx(trained.validation["validation_accuracy"])
    about = json.loads((tmp_path / "weights" / f"{trained.key}.json").read_text())
    assert about["parts"]["seed"] == 0 and about["torch"] == torch.__version__


def test_same_seed_same_bytes_other_seed_other_weights(tmp_path):
    first, again = run(tmp_path / "a"), run(tmp_path / "b")
    other = run(tmp_path / "a", seed=1)
    assert first.sha256 == again.sha256 != other.sha256


def test_random_states_are_left_as_they_were(tmp_path):
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    run(tmp_path, recipe=adversarial())
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_the_result_does_not_depend_on_the_random_state_outside(tmp_path):
    torch.manual_seed(1)
    first = run(tmp_path / "a")
    torch.manual_seed(2)
    assert run(tmp_path / "b").sha256 == first.sha256


def test_the_test_set_is_not_looked_at(tmp_path):
    # Tensors with a shape and no content: any use of a value raises.
    data = make_data()
    hidden = Split(data.test.images.to("meta"), data.test.labels.to("meta"), data.test.indices)
    assert run(tmp_path / "a", data=replace(data, test=hidden), recipe=adversarial()).epoch


def test_one_sgd_step_is_the_textbook_one(tmp_path):
    data = make_data(train=12)
    schedule = Schedule(epochs=1, batch_size=12, learning_rate=0.5, optimizer="sgd", momentum=0,
                        schedule="cosine")  # fmt: skip
    trained = run(tmp_path, build=linear_network, data=data, schedule=schedule)
    # From zero weights every class has probability 1/3: the gradient in closed form.
    x = data.train.images.double().flatten(1) / 255
    error = torch.full((12, 3), 1 / 3, dtype=torch.float64)
    error[torch.arange(12), data.train.labels] -= 1
    expected = -0.5 * error.T @ x / 12
    found = trained.model.network[1].weight
    assert torch.allclose(found.double(), expected, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class Unlearning(Standard):
    """Learns wrong classes in the second half."""

    def loss(self, model, step):
        y = step.y if step.progress < 0.5 else (step.y + 1) % 3
        return super().loss(model, replace(step, y=y))


def test_the_epoch_is_selected_by_validation(tmp_path):
    schedule = Schedule(epochs=6, batch_size=16, learning_rate=0.05, schedule="step", milestones=())
    trained = run(tmp_path, recipe=Unlearning(), schedule=schedule)
    scores = [entry["validation_accuracy"] for entry in trained.history]
    assert scores[-1] < 0.5 < max(scores)
    assert scores[trained.epoch - 1] == max(scores) == trained.validation["validation_accuracy"]


def entry(number, clean, robust=None, *, settled=True):
    return {
        "epoch": number,
        "validation_accuracy": clean,
        "robust_validation_accuracy": robust,
        "settled": settled,
        "seconds": 1.0,
    }


@pytest.mark.parametrize(
    ("entries", "selected"),
    [
        ([entry(1, 0.9), entry(2, 0.9), entry(3, 0.8)], 2),  # a tie: the later one
        ([entry(1, 0.9, 0.5), entry(2, 0.8, 0.6), entry(3, 0.95, 0.4)], 2),  # robust decides
        # Also one of the warm-up: its robust accuracy was measured at the full budget.
        ([entry(1, 0.9, 0.7, settled=False), entry(2, 0.9, 0.6), entry(3, 0.9, 0.5)], 1),
        ([entry(1, 0.9, 0.0, settled=False), entry(2, 0.9, 0.6), entry(3, 0.9, 0.5)], 2),
    ],
)
def test_selection(entries, selected):
    course, model = Course(), nn.Linear(1, 1)
    for number, one in enumerate(entries):
        with torch.no_grad():
            model.weight.fill_(number + 1)
        course.add(one, model)
    assert course.selected == selected
    assert course.weights["weight"].item() == selected


def test_the_epoch_is_selected_by_robust_accuracy_at_the_full_budget(tmp_path):
    schedule = replace(SCHEDULE, epochs=4)
    trained = run(tmp_path, recipe=adversarial(ramp=0.5), schedule=schedule)
    assert [e["settled"] for e in trained.history] == [False, False, True, True]
    scores = [e["robust_validation_accuracy"] for e in trained.history]
    assert scores[trained.epoch - 1] == max(scores)
    assert trained.validation["robust_validation_accuracy"] == max(scores)
    assert set(trained.validation) == {"validation_accuracy", "robust_validation_accuracy"}


def test_the_average_is_what_is_kept(tmp_path):
    plain = run(tmp_path, schedule=replace(SCHEDULE, epochs=1))
    averaged = run(tmp_path, schedule=replace(SCHEDULE, epochs=1, average_decay=0.9))
    one, other = weights_of(plain.model), weights_of(averaged.model)
    assert not torch.equal(one["network.0.weight"], other["network.0.weight"])
    assert torch.equal(one["normalize.mean"], other["normalize.mean"])


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_damaged_weights_are_set_aside_and_trained_again(tmp_path, cut):
    first = run(tmp_path)
    path = tmp_path / "weights" / f"{first.key}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:cut] if cut >= 0 else content[:-1] + b"\x07")
    again = run(tmp_path)
    assert not again.cached and again.sha256 == first.sha256
    assert len(again.warnings) == 1 and again.warnings[0].startswith("cache_damaged: ")
    assert path.with_name(f"{path.name}.damaged").exists()
    assert run(tmp_path).warnings == ()


def test_weights_without_their_json_do_not_count(tmp_path):
    first = run(tmp_path)
    (tmp_path / "weights" / f"{first.key}.json").unlink()
    assert not run(tmp_path).cached


@pytest.mark.parametrize("content", [b"", b"torn", {"format": 1, "key": "other"}])
def test_a_torn_or_foreign_state_is_set_aside(tmp_path, content):
    key = weights_key(make_data(), Standard(), SCHEDULE, seed=0, key=KEY)
    state = tmp_path / "training" / f"{key}.pt"
    state.parent.mkdir()
    if isinstance(content, bytes):
        state.write_bytes(content)
    else:
        torch.save(content, state)
    trained = run(tmp_path)
    assert trained.warnings[0].startswith("cache_damaged: ")
    assert trained.sha256 == run(tmp_path / "clean").sha256
    assert not state.exists()


def test_half_a_state_leaves_no_trace_in_the_weights(tmp_path):
    """The weights of the file fit, its optimiser does not."""
    key = weights_key(make_data(), Standard(), SCHEDULE, seed=0, key=KEY)
    foreign = {name: value + 1 for name, value in small_network().state_dict().items()}
    parts = {"model": foreign, "average": foreign, "updates": 0, "optimizer": {}, "scaler": {}}
    state = {"format": 1, "key": key, "training": parts, "course": {}}
    (tmp_path / "training").mkdir()
    torch.save(state, tmp_path / "training" / f"{key}.pt")
    assert run(tmp_path).sha256 == run(tmp_path / "clean").sha256


@dataclass(frozen=True, kw_only=True)
class Diverging(Standard):
    def loss(self, model, step):
        loss, logits = super().loss(model, step)
        return (loss * float("nan") if step.number == 8 else loss), logits


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"nan in epoch 2, step 3.*train\.learning_rate"):
        run(tmp_path, recipe=Diverging())
    assert issubclass(TrainingDiverged, UserError)
    assert not list(tmp_path.glob("*/*"))


@dataclass(frozen=True, kw_only=True)
class LossAlone(Standard):
    def loss(self, model, step):
        return super().loss(model, step)[0]


@dataclass(frozen=True, kw_only=True)
class LossPerImage(Standard):
    def loss(self, model, step):
        _, logits = super().loss(model, step)
        return logits.logsumexp(1), logits


@pytest.mark.parametrize("recipe", [LossAlone, LossPerImage])
def test_a_recipe_that_returns_something_else_is_told(tmp_path, recipe):
    with pytest.raises(UserError, match=rf"^{recipe.__name__}\.loss did not .*return loss, logits"):
        run(tmp_path, recipe=recipe())


@dataclass(frozen=True, kw_only=True)
class LastStepBreaks(Standard):
    def loss(self, model, step):
        loss, logits = super().loss(model, step)
        if step.number == 11:  # a finite loss with an infinite gradient
            loss = loss + (loss.detach() - loss).abs().sqrt()
        return loss, logits


def test_weights_broken_by_the_last_step_are_noticed(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"not finite after epoch 2"):
        run(tmp_path, recipe=LastStepBreaks())


def test_ctrl_c_keeps_the_last_whole_epoch(tmp_path):
    whole = run(tmp_path / "whole")

    @dataclass(frozen=True, kw_only=True)
    class Stopped(Standard):
        def loss(self, model, step):
            if step.number == 9 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise KeyboardInterrupt
            return super().loss(model, step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe=Stopped())
    assert run(tmp_path, recipe=Stopped()).sha256 == whole.sha256


def test_the_key_follows_what_decides_the_weights():
    data, seed = make_data(), 0
    base = weights_key(data, Standard(), SCHEDULE, seed=seed, key=KEY)
    faster = replace(SCHEDULE, learning_rate=0.02)
    others = [
        weights_key(data, Standard(), faster, seed=seed, key=KEY),
        weights_key(make_data(seed=1), Standard(), SCHEDULE, seed=seed, key=KEY),
        weights_key(data, Standard(), SCHEDULE, seed=1, key=KEY),
        weights_key(data, Standard(), SCHEDULE, seed=seed, key={"model": "other"}),
        weights_key(data, adversarial(), SCHEDULE, seed=seed, key=KEY),
        weights_key(data, adversarial(epsilon=0.2), SCHEDULE, seed=seed, key=KEY),
    ]
    assert len({base, *others}) == 7
    assert base == weights_key(data, Standard(), replace(SCHEDULE), seed=seed, key=dict(KEY))


def test_undefended_weights_do_not_depend_on_the_code_of_attacks(monkeypatch):
    from robustbench_local.training import identity

    seen = []
    monkeypatch.setattr(identity, "code_version", lambda *parts: seen.extend(parts) or "code")
    identity.key_parts(make_data(), Standard(), SCHEDULE, seed=0, key=KEY)
    assert not any("attack" in part or "threat" in part for part in seen)
    seen.clear()
    parts = identity.key_parts(make_data(), adversarial(), SCHEDULE, seed=0, key=KEY)
    assert "threat.py" in seen
    assert parts["recipe"]["attack"][""] == "robustbench_local.attacks.gradient.PGD"
    assert parts["recipe"]["threat"]["epsilon"] == 0.1
    json.dumps(parts, allow_nan=False)


def test_the_key_of_adversarial_training_holds_all_code_that_pgd_runs_through(monkeypatch):
    from robustbench_local.training import identity

    def imported(file: str) -> set[str]:
        """The files of the package that a file imports when it is imported itself."""
        body = ast.parse((PACKAGE / file).read_text()).body
        names = [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
        names += [
            f"{node.module}.{name.name}"
            for node in body
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        ]
        paths = {name.removeprefix("robustbench_local.").replace(".", "/") for name in names}
        return {f"{path}.py" for path in paths if (PACKAGE / f"{path}.py").is_file()}

    seen = []
    monkeypatch.setattr(identity, "code_version", lambda *parts: seen.extend(parts) or "code")
    identity.key_parts(make_data(), adversarial(), SCHEDULE, seed=0, key=KEY)
    reached, ahead = set(), {"attacks/gradient.py"}
    while ahead:
        reached |= ahead
        ahead = set().union(*map(imported, ahead)) - reached
    assert {"oracle.py", "attacks/target.py"} <= reached
    assert reached - set(seen) == {"errors.py", "types.py"}  # which compute nothing


def test_fewer_images_than_a_batch(tmp_path):
    data = make_data(train=9, held=3)
    trained = run(tmp_path, data=data, schedule=replace(SCHEDULE, min_steps=20))
    assert len(trained.history) == 2


def test_channels_last_weights_are_stored_contiguous_and_load_the_same(tmp_path):
    class Net(nn.Sequential):
        channels_last = True

    def build():
        net = Net(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        return Normalized(net, [0], [1], channels=1)

    first = run(tmp_path, build=build)
    stored = load_file(tmp_path / "weights" / f"{first.key}.safetensors")
    assert all(value.is_contiguous() for value in stored.values())
    x = make_data().test.pixels(slice(None))
    assert torch.equal(first.model(x), run(tmp_path, build=build).model(x))

"""A search finds what looking everywhere finds, goes on where it was, and survives failures."""

import json
import math
import os
import subprocess
import sys
import threading

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from robustbench_local.errors import UserError
from robustbench_local.search import Search, read_space, score, tell

pytest.importorskip("optuna")


def space(*words):
    return read_space(OverridesParser.create().parse_overrides(list(words)))


def search(folder, *words, **changes):
    settings = {"n_trials": 25, "n_jobs": 1, "seed": 0, "startup": 5, **changes}
    return Search(space=space(*words), storage=folder, **settings)


def launching(value, asked):
    """Runs trials by asking `value` for the accuracy of each; None for one that fails."""

    def launch(trials, first):
        asked.extend(trials)
        found = [value(dict(word.split("=") for word in words)) for words in trials]
        return ["no" if x is None else ("robust_validation_accuracy", x) for x in found]

    return launch


GRID = ("fixed=3", "a=1,2,3", "b=choice(x,y)", "c=range(0,6,2)")


def accuracy(settings):
    assert settings["fixed"] == "3"
    if settings["b"] == "y" and settings["a"] == "1":
        return None
    return int(settings["a"]) / 10 + int(settings["c"]) / 100 + (settings["b"] == "y") / 1000


def test_few_settings_are_all_tried_once(tmp_path):
    asked = []
    one = search(tmp_path, *GRID, n_jobs=4)
    one.run(launching(accuracy, asked))
    assert len({tuple(words) for words in asked}) == len(asked) == 18
    assert one.best.params == {"a": "3", "b": "y", "c": 4}
    assert one.best.value == pytest.approx(0.341)
    assert sum(trial.value is None for trial in one.finished) == 3  # failed, and not 0


CURVE = ("rate=tag(log,interval(1e-4,1))", "depth=int(interval(1,8))")


def hill(settings):
    rate, depth = math.log10(float(settings["rate"])), int(settings["depth"])
    return 0.9 - 0.05 * (rate + 2) ** 2 - 0.02 * (depth - 5) ** 2


def test_many_settings_are_searched(tmp_path):
    asked = []
    one = search(tmp_path, *CURVE)
    one.run(launching(hill, asked))
    assert len(asked) == 25
    best = max(hill(dict(word.split("=") for word in words)) for words in asked)
    assert one.best.value == best > 0.85
    rates = [float(words[0].split("=")[1]) for words in asked]
    assert min(rates) < 1e-2 < max(rates)


def test_a_search_that_was_interrupted_ends_like_any_other(tmp_path):
    whole, before, after = [], [], []
    one = search(tmp_path / "whole", *CURVE, n_trials=12)
    one.run(launching(hill, whole))

    def stopping(settings):
        if len(before) == 8:
            raise KeyboardInterrupt
        return hill(settings)

    first = search(tmp_path / "parts", *CURVE, n_trials=12)
    with pytest.raises(KeyboardInterrupt):
        first.run(launching(stopping, before))
    first.close()
    again = search(tmp_path / "parts", *CURVE, n_trials=12)
    again.run(launching(hill, after))
    assert after[0] == before[-1]  # the one that was under way
    assert len(before[:-1] + after) == 12 == len(again.finished)
    assert before[:-1] + after[:1] == whole[:8]
    again.close()
    more = search(tmp_path / "parts", *CURVE, n_trials=14)
    more.run(launching(hill, after))
    assert len(more.finished) == 14


def test_one_search_at_a_time(tmp_path):
    first = search(tmp_path, *CURVE)
    with pytest.raises(UserError, match="at the same search"):
        search(tmp_path, *CURVE)
    first.close()
    search(tmp_path, *CURVE).close()


@pytest.mark.parametrize(
    ("content", "alive"),
    [
        ("filelock/2\npid=1\nhost=another-machine\nmode=lease\ntoken=ab\nduration=0.8\n", False),
        ("filelock/2\npid=1\nhost=another-machine\nmode=lease\ntoken=ab\nduration=0.8\n", True),
        ("", False),
    ],
    ids=["of a machine that is off", "of one that is on", "empty"],
)
def test_a_lease_that_nobody_renews_is_taken_over(tmp_path, monkeypatch, content, alive):
    monkeypatch.setattr("robustbench_local.leases.LEASE", 0.8)
    monkeypatch.setattr("robustbench_local.leases.HEARTBEAT", 0.2)
    search(tmp_path, *CURVE).close()
    (log,) = tmp_path.glob("*.log")
    lease = log.with_suffix(".lease")
    lease.write_text(content)
    over = threading.Event()

    def live():
        while alive and not over.wait(0.1):
            os.utime(lease)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        if alive:
            with pytest.raises(UserError, match="process 1 on another-machine is at the same"):
                search(tmp_path, *CURVE)
        else:
            search(tmp_path, *CURVE).close()
    finally:
        over.set()
        thread.join()


def test_what_is_measured_otherwise_does_not_compete(tmp_path):
    one = search(tmp_path, "a=1,2")
    one.run(
        lambda trials, first: [
            ("robust_validation_accuracy", 0.5) if "a=1" in words else ("validation_accuracy", 0.9)
            for words in trials
        ]
    )
    assert one.best.params == {"a": "1"}


def test_only_validation_images_count():
    record = {"weights": {"validation": {"validation_accuracy": 0.9}}}
    assert score([record]) == ("validation_accuracy", 0.9)  # and nothing else is in the record
    record["weights"]["validation"]["robust_validation_accuracy"] = 0.4
    assert score([record]) == ("robust_validation_accuracy", 0.4)
    record["weights"]["validation"] = {}
    assert isinstance(score([record]), str) and isinstance(score(None), str)


@pytest.mark.parametrize(
    "key", ["train.threat.epsilon", "defense.recipe.trades.validation.steps", "train.threat.norm"]
)
def test_what_measures_the_trials_is_no_choice(key):
    with pytest.raises(UserError, match=rf"{key} .*measured.*type {key}=0.1$"):
        space(f"{key}=0.1,0.2", "a=1,2")
    assert f"{key}=0.1" in space(f"{key}=0.1", "a=1,2").fixed


@pytest.mark.parametrize("words", [("a=1",), ("a=interval(2,1)",), ("a=tag(log,interval(0,1))",)])
def test_a_space_that_cannot_be_searched(words):
    with pytest.raises(UserError, match="type "):
        space(*words)


@pytest.mark.parametrize("changes", [{"n_trials": 0}, {"n_jobs": 1.5}, {"startup": True}])
def test_settings_of_the_search(tmp_path, changes):
    with pytest.raises(UserError, match=r"hydra\.sweeper\."):
        search(tmp_path, *CURVE, **changes)


def test_an_experiment_that_did_not_choose_the_sweeper_is_typed_again(tmp_path, capsys):
    one = search(tmp_path, "+experiment=smoke", *GRID)
    one.run(launching(accuracy, []))
    for experiments, typed in ((True, "  +experiment=smoke fixed=3 a=3"), (False, "  fixed=3 a=3")):
        tell(one, 0, experiments=experiments)
        assert capsys.readouterr().out.splitlines()[-1].startswith(typed)


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    words = [
        sys.executable, "-m", "robustbench_local", "+experiment=search", "dataset.source=embedded",
        "dataset.test_size=20", "model.width=4", "model.hidden=8", "train.min_steps=1",
        "defense=adversarial_training", "train.epochs=1", "train.adversarial_steps=1",
        "train.adversarial_step_size=1.0", "train.learning_rate=choice(1e-6,0.01,-1)",
    ]  # fmt: skip
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stderr.count("train.learning_rate=-1") == 1, done.stderr
    assert "search: 3 trials, which are all settings there are, 1 failed" in done.stdout
    records = [
        json.loads(path.read_text())
        for path in tmp_path.glob("cache/search/results/records/*.json")
    ]
    found = {
        record["config"]["train"]["learning_rate"]: record["weights"]["validation"][
            "robust_validation_accuracy"
        ]
        for record in records
    }
    assert len(found) == 2
    best = max(found, key=found.get)
    assert f"best robust validation accuracy: {found[best]:.2%}" in done.stdout
    typed = done.stdout.strip().splitlines()[-1].split()
    assert "defense=adversarial_training" in typed and f"train.learning_rate={best}" in typed
    assert not any("experiment" in word for word in typed)

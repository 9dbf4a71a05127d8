"""Trackers are told of each record once; what they kept is read back with their own readers."""

import json
import math
import socket
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from robustbench_local.__main__ import CONF
from robustbench_local.errors import UserError
from robustbench_local.run import Choices, run
from robustbench_local.tracking import MLflow, Tracker

SMALL = (
    "+experiment=smoke", "model.width=2", "model.hidden=8", "train.epochs=2", "device=cpu",
    "dataset.test_size=30", "attack.steps=3", "threat.epsilon=0.05",
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """They are trained once for all tests."""
    return tmp_path_factory.mktemp("weights")


@cache
def composed(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*SMALL, *words], return_hydra_config=True)


@pytest.fixture
def evaluate(weights, tmp_path):
    """Call `evaluate("tracking=mlflow")`; gives the record."""

    def call(*words):
        config = composed(*words)
        choices = dict(config.hydra.runtime.choices)
        ours = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        paths = {"data": "none", "cache": str(weights), "results": str(tmp_path / "results")}
        (record,) = run(OmegaConf.merge(ours, {"paths": paths}), Choices(choices, (CONF,)))
        return record

    return call


def expected(record):
    """Some numbers of a record under the names that trackers give them."""
    return {
        "clean_accuracy": record["clean_accuracy"]["value"],
        "robust_accuracy": record["robust_accuracy"]["value"],
        "robust_accuracy_low": record["robust_accuracy"]["low"],
        "robust_accuracy_high": record["robust_accuracy"]["high"],
        "attack_success_rate": record["attack_success_rate"],
        "seconds.training": record["seconds"]["training"],
        "passes_per_attacked_image.forward": record["passes_per_attacked_image"]["forward"],
    }


def losses(weights, record):
    about = weights / "weights" / f"{record['weights']['key']}.json"
    return [epoch["loss"] for epoch in json.loads(about.read_text())["history"]]


def test_mlflow_has_parameters_metrics_tags_and_the_record(evaluate, weights, tmp_path, capsys):
    tracking = pytest.importorskip("mlflow.tracking")
    record = evaluate("tracking=mlflow")
    client = tracking.MlflowClient((tmp_path / "results/mlruns").as_uri())
    place = client.get_experiment_by_name("robustbench-local").experiment_id
    (found,) = client.search_runs([place])
    assert found.info.status == "FINISHED"
    for key, value in expected(record).items():
        assert found.data.metrics[key] == value
    history = client.get_metric_history(found.info.run_id, "training.loss")
    assert [(each.step, each.value) for each in history] == list(
        enumerate(losses(weights, record), 1)
    )
    assert found.data.params["attack.steps"] == "3"
    assert found.data.params["threat.query_budget"] == "null"
    assert found.data.params["attack._target_"] == "robustbench_local.attacks.PGD"
    assert "tracking.experiment" not in found.data.params
    tags = found.data.tags
    assert tags["robustbench_local.run_id"] == record["run_id"]
    assert tags["comparability"] == record["comparability"]
    assert tags["flags"] == "subset"
    assert (tags["attack"], tags["defense"]) == (record["labels"]["attack"], "none")
    local = client.download_artifacts(found.info.run_id, "record.json")
    with open(local) as file:
        assert json.load(file) == record

    # Known already, though nothing but the tracker is asked; forced, the numbers are the same.
    evaluate("tracking=mlflow")
    evaluate("tracking=mlflow", "force=true")
    assert len(client.search_runs([place])) == 1
    # Another run joins the experiment.
    evaluate("tracking=mlflow", "attack=fgsm", "~attack.steps")
    assert len(client.search_runs([place])) == 2
    assert "could not be logged" not in capsys.readouterr().err


def test_what_mlflow_was_not_told_in_full_is_told_again(evaluate, tmp_path, monkeypatch, capsys):
    tracking = pytest.importorskip("mlflow.tracking")
    with monkeypatch.context() as broken:

        def full(*words):
            raise OSError("no space left")

        broken.setattr(tracking.MlflowClient, "log_dict", full)
        record = evaluate("tracking=mlflow")
    assert "could not be logged (no space left)" in " ".join(capsys.readouterr().err.split())
    evaluate("tracking=mlflow")
    client = tracking.MlflowClient((tmp_path / "results/mlruns").as_uri())
    place = client.get_experiment_by_name("robustbench-local").experiment_id
    assert sorted(each.info.status for each in client.search_runs([place])) == [
        "FAILED",
        "FINISHED",
    ]
    assert (tmp_path / f"results/records/{record['run_id']}.json").exists()


def test_a_server_that_is_not_there_costs_a_sentence_and_no_record(evaluate, tmp_path, capsys):
    pytest.importorskip("mlflow.tracking")
    with socket.socket() as closed:  # a port that nobody listens to
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        record = evaluate("tracking=mlflow", f"tracking.uri=http://127.0.0.1:{port}")
    told = [line for line in capsys.readouterr().err.splitlines() if "tracking:" in line]
    assert len(told) == 1
    assert f"run {record['run_id']} could not be logged" in told[0]
    assert (tmp_path / f"results/records/{record['run_id']}.json").exists()
    assert not (tmp_path / "results/mlruns").exists()


def test_tensorboard_has_curves_settings_numbers_and_text(evaluate, weights, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    record = evaluate("tracking=tensorboard")
    folder = tmp_path / "results/tensorboard" / record["run_id"]
    before = sorted(path.name for path in folder.iterdir())
    board = EventAccumulator(str(folder))
    board.Reload()
    for key, value in expected(record).items():
        (event,) = board.Scalars(key)
        assert math.isclose(event.value, value, rel_tol=1e-6)
    curve = board.Scalars("training.loss")
    assert [event.step for event in curve] == [1, 2]
    assert [event.value for event in curve] == pytest.approx(losses(weights, record), rel=1e-6)
    text = board.Tensors("tags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert record["comparability"] in text and "| flags | subset |" in text
    data = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(data).session_start_info.hparams
    assert settings["attack.steps"].number_value == 3
    assert settings["attack.loss"].string_value == "ce"
    assert settings["force"].bool_value is False

    evaluate("tracking=tensorboard", "force=true")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in folder.parent.iterdir()] == [record["run_id"]]


def test_tensorboard_writes_where_it_is_told_and_leaves_nothing_half(
    evaluate, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    board = tmp_path / "board"
    words = ("tracking=tensorboard", f"tracking.dir={board}")
    with monkeypatch.context() as broken:

        def full(*words, **named):
            raise OSError("no space left")

        broken.setattr(SummaryWriter, "add_hparams", full)
        record = evaluate(*words)
    assert "could not be logged (no space left)" in " ".join(capsys.readouterr().err.split())
    assert list(board.iterdir()) == []
    evaluate(*words)
    assert [path.name for path in board.iterdir()] == [record["run_id"]]
    assert not (tmp_path / "results/tensorboard").exists()


def test_a_missing_package_is_told_before_anything_is_done(evaluate, tmp_path, monkeypatch):
    def missing(self):
        raise ModuleNotFoundError("No module named 'mlflow'")

    monkeypatch.setattr(MLflow, "load", missing)
    with pytest.raises(UserError, match=r"type pip install 'robustbench-local\[mlflow\]'"):
        evaluate("tracking=mlflow")
    assert not (tmp_path / "results").exists()


class Collected(Tracker):
    """A user's own tracker."""

    needs = "nothing"
    seen: list[str] = []  # noqa: RUF012

    def load(self):
        return None

    def log(self, entry, results):
        self.seen.append(entry.name)


def test_a_tracker_of_ones_own_is_one_class(evaluate):
    evaluate("tracking=none", f"+tracking._target_={__name__}.Collected")
    assert Collected.seen == ["small_cnn-hidden8-width2 none pgd-steps3 0.05"]
    with pytest.raises(UserError, match="makes no tracker but Audit; derive the class"):
        evaluate("+tracking._target_=robustbench_local.evaluation.Audit")

"""Whole runs of a defense that rejects images: what is refused, recorded and shown."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from robustbench_local.__main__ import CONF
from robustbench_local.errors import UserError
from robustbench_local.results.store import Record, Store
from robustbench_local.run import Choices, run

QUICK = ("+experiment=smoke", "model.width=4", "model.hidden=16", "train.epochs=1",
         "attack.steps=5", "defense=feature_squeezing_detector")  # fmt: skip


def ran(folder: Path, *words: str) -> Record:
    paths = [f"paths.{name}={folder / name}" for name in ("data", "cache", "results")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*words, *paths])
        runtime = compose("config", [*words, *paths], return_hydra_config=True).hydra.runtime
    (record,) = run(config, Choices(dict(runtime.choices), ()))
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_attacks_that_cannot_know_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    words = [word for word in QUICK if not word.startswith("attack.")]
    for attack in ("torchattacks", "art", "autoattack"):
        with pytest.raises(UserError, match="would count images that the defense rejects"):
            ran(tmp_path, *words, f"attack={attack}")
    assert list(tmp_path.iterdir()) == []


def test_what_is_recorded_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = ran(folder, *QUICK)
    found = record["detection"]
    assert found["false_positive_rate"] == 0.05 and found["validation_images"] == 200
    assert found["validation_rejected"] <= 0.05
    assert np.array(record["metrics"]["clean"]["confusion"]).shape == (10, 11)
    said = " ".join(capsys.readouterr().out.split())
    assert "linf 0.3; rejecting an attacked image counts as robust" in said
    assert f"rejected: {100 * found['clean_rejected']:.2f}% of the clean images" in said
    assert f"(ROC-AUC {found['attacked_roc_auc']:.3f})" in said
    examples = Store(folder / "results").examples(record["run_id"])
    rejected = examples.clean_prediction == 10
    assert found["clean_rejected"] == rejected.mean() == examples.clean_rejected.mean()
    # Right before and, after, right or rejected.
    before = examples.clean_prediction == examples.labels
    after = np.isin(examples.adversarial_prediction, [10]) | (
        examples.adversarial_prediction == examples.labels
    )
    assert record["clean_accuracy"]["value"] == pytest.approx(before.mean())
    assert record["robust_accuracy"]["value"] == pytest.approx((before & after).mean())


def test_rows_with_rejection_are_compared_among_themselves(folder: Path) -> None:
    rejecting = ran(folder, *QUICK)
    bare = ran(folder, *QUICK[:-1])
    assert bare["detection"] is None
    assert np.array(bare["metrics"]["clean"]["confusion"]).shape == (10, 10)
    assert bare["weights"]["sha256"] == rejecting["weights"]["sha256"]
    assert bare["comparability"] != rejecting["comparability"]
    stricter = "defense.wrap.feature_squeezing_detector.false_positive_rate=0.2"
    other = ran(folder, *QUICK, stricter)
    assert other["comparability"] == rejecting["comparability"]
    assert other["detection"]["threshold"] < rejecting["detection"]["threshold"]


def test_the_network_alone_is_anybodys_to_attack(folder: Path) -> None:
    words = [word for word in QUICK if not word.startswith("attack.")]
    record = ran(folder, *words, "awareness=oblivious", "attack=torchattacks", "attack.name=FGSM")
    assert record["detection"]["attacked"] == round(record["clean_accuracy"]["value"] * 100)
    assert 0 < record["detection"]["attacked_rejected"] < 1

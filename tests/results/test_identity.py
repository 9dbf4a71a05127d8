"""Runs that another version of a library would answer otherwise are other runs."""

from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from robustbench_local.__main__ import CONF
from robustbench_local.results import record

DATA = SimpleNamespace(name="digits", fingerprint="0", test_fingerprint="1")


@pytest.mark.parametrize(
    ("overrides", "depends"),
    [
        (["attack=art"], True),
        (["attack=torchattacks"], True),
        (["defense=art"], True),
        (["defense=art_detector"], True),
        (["defense=[adversarial_training,art]"], True),
        # A part of a defense may train on what another library's attack finds.
        (
            [
                "defense=detector",
                "defense.wrap.detector.attack._target_=robustbench_local.attacks.TorchAttacks",
            ],
            True,
        ),
        (["defense=detector"], False),
        (["defense=[adversarial_training,jpeg]"], False),
    ],
)
def test_the_version_of_a_library_counts_where_it_does_the_work(monkeypatch, overrides, depends):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_container(compose("config", overrides), resolve=True)

    def name(version):
        monkeypatch.setattr(record, "library_versions", lambda: {"library": version})
        return record.run_identity(settings, DATA, torch.device("cpu"))

    assert name("1.0") == name("1.0")
    assert (name("1.0") != name("2.0")) is depends

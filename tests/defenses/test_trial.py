"""A defense is tried before anything is trained for it."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustbench_local.__main__ import main
from robustbench_local.attacks import PGD
from robustbench_local.data import Dataset
from robustbench_local.defenses import (
    Defense,
    Denoiser,
    FeatureSqueezingDetector,
    Median,
    Preprocess,
    ResizePad,
    check_defense,
)
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel


class Brighter(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return x + 0.25


class Shifted(Preprocess):
    """A stand-in of one row less."""

    def transform(self, x: Tensor) -> Tensor:
        return x.round()

    def surrogate(self, x: Tensor) -> Tensor:
        return x[:, :, 1:]


class InPlace(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


class Breaking(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        raise KeyError("table")


class Softmax(nn.Module):
    """A wrapper that keeps two classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, :2].softmax(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (Brighter(), r"^Brighter\.transform returned pixels from 0\.25 to 1\.25"),
        (Shifted(), r"^Shifted\.surrogate returned shape \(2, 1, 27, 28\)"),
        (InPlace(), r"^defense mine changes the images it is given; expected new ones"),
        (Breaking(), r"^defense mine fails .*\(2, 1, 28, 28\) \(KeyError: 'table'\); expected"),
        (
            ResizePad(output=1.107),
            r"^defense mine fails .*that the network takes",
        ),
        (Brighter(in_training=True, at_run_time=False), r"^Brighter\.transform returned pixels"),
        (Softmax, r"returned \(2, 2\).*expected logits of shape \(2, 10\)"),
        (lambda model: None, r"^defense mine returned a NoneType; expected a torch\.nn\.M"),
    ],
)
def test_a_trial_on_two_images_tells_it(digits: Dataset, wrap: object, told: str) -> None:
    model, state = network(), torch.get_rng_state()
    before = digits.test.images[:2].clone()
    with pytest.raises(UserError, match=told) as caught:
        check_defense(Defense(wrap={"mine": wrap}), model, digits)  # type: ignore[dict-item]
    assert "\n" not in str(caught.value)
    assert torch.equal(digits.test.images[:2], before) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_needs_no_training_of_a_wrap_that_learns_is_tried(digits: Dataset) -> None:
    squeezing = FeatureSqueezingDetector(squeezers={"mine": Brighter()})
    with pytest.raises(UserError, match=r"^Brighter\.transform returned pixels"):
        check_defense(Defense(wrap={"squeezing": squeezing}), network(), digits)
    sound = FeatureSqueezingDetector(squeezers={"median": Median(size=2)})
    check_defense(Defense(wrap={"squeezing": sound}), network(), digits)

    def denoiser(layer: object) -> Denoiser:
        threat = ThreatModel(norm="linf", epsilon=0.3)
        return Denoiser(attack=PGD(), threat=threat, layer=layer)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"denoiser\.layer=2 is no layer .* one of 0, 1: type"):
        check_defense(Defense(wrap={"denoiser": denoiser(2)}), network(), digits)
    for layer in (1, "1", None):  # on the command line layer=1 is a number
        check_defense(Defense(wrap={"denoiser": denoiser(layer)}), network(), digits)


def test_a_sound_defense_passes_its_trial(digits: Dataset) -> None:
    class Learning(Preprocess):
        def transform(self, x: Tensor) -> Tensor:
            raise RuntimeError("not fitted yet")

        def fit(self, workshop: object) -> "Learning":
            raise AssertionError("a trial trains nothing")

    wraps = {"median": Median(size=3), "learned": Learning(), "pad": ResizePad(in_training=True)}
    check_defense(Defense(wrap=wraps), network(), digits)
    check_defense(Defense(), network(), digits)


def test_a_bad_part_ends_the_run_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    part = f"+defense.wrap.mine._target_={__name__}.Brighter"
    monkeypatch.setattr(sys, "argv", ["robustbench_local", "+experiment=smoke", part])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        main()
    told = f"{stop.value.code}{capsys.readouterr().err}"
    assert "Brighter.transform returned pixels" in told and "Traceback" not in told
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.json"))

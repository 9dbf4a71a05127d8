import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustbench_local.errors import UserError
from robustbench_local.models import Normalized, load_checkpoint


def make_model():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    return Normalized(network, [0.5], [0.25], channels=1)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and set(one) == set(other)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "safetensors"])
@pytest.mark.parametrize("part", ["network", "whole"])
def test_weights_come_back(tmp_path, suffix, part):
    source, target = make_model(), make_model()
    source.normalize.mean.fill_(0.125)
    weights = source.state_dict() if part == "whole" else source.network.state_dict()
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(dict(weights), path)
    load_checkpoint(target, path)
    assert same(source.network.state_dict(), target.network.state_dict())
    assert target.normalize.mean.item() == (0.125 if part == "whole" else 0.5)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_the_usual_wrappings_are_taken_off(tmp_path, wrapper):
    source, target = make_model(), make_model()
    weights = {f"module.{name}": value for name, value in source.network.state_dict().items()}
    torch.save({wrapper: weights, "epoch": 3}, tmp_path / "w.pt")
    load_checkpoint(target, str(tmp_path / "w.pt"))
    assert same(source.network.state_dict(), target.network.state_dict())


def test_a_users_network_may_have_a_part_called_network(tmp_path):
    def build():
        inner = nn.Sequential()
        inner.add_module("network", nn.Linear(2, 2))
        return Normalized(inner, [0], [1], channels=1)

    source, target = build(), build()
    torch.save(source.network.state_dict(), tmp_path / "w.pt")
    load_checkpoint(target, tmp_path / "w.pt")
    assert same(source.state_dict(), target.state_dict())


def test_everything_that_does_not_fit_is_told_at_once(tmp_path):
    weights = dict(make_model().network.state_dict())
    weights["2.weight"] = torch.zeros(3, 9)
    del weights["0.bias"]
    weights |= {f"extra.{k}": torch.zeros(1) for k in range(5)}
    torch.save(weights, tmp_path / "w.pt")
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_checkpoint(model, tmp_path / "w.pt")
    text = str(error.value)
    assert "1 missing (0.bias)" in text
    assert "5 unexpected (extra.0, extra.1, extra.2 and 2 more)" in text
    assert "1 wrongly shaped (2.weight (3, 9) instead of (3, 8))" in text
    assert same(before, model.state_dict())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["pickle", "torch", "torch_legacy"])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, writer):
    path, trace = tmp_path / "w.pt", tmp_path / "executed"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil(trace)}))
    else:
        torch.save(
            {"state_dict": Evil(trace)}, path, _use_new_zipfile_serialization=writer == "torch"
        )
    with pytest.raises(UserError, match=r"pickled code and is refused.*safetensors"):
        load_checkpoint(make_model(), path)
    assert not trace.exists()


def test_a_file_of_another_kind_is_not_called_code(tmp_path):
    (tmp_path / "w.pt").write_text("# Weights\n")
    with pytest.raises(UserError, match=r"w\.pt holds no weights; expected a \.safetensors"):
        load_checkpoint(make_model(), tmp_path / "w.pt")


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(make_model(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"pickled code.*state_dict\(\)"):
        load_checkpoint(make_model(), tmp_path / "w.pt")


def test_missing_empty_and_foreign_files_are_told(tmp_path):
    with pytest.raises(UserError, match=r"model\.checkpoint=.*is missing"):
        load_checkpoint(make_model(), tmp_path / "none.pt")
    with pytest.raises(UserError, match="is not a file"):
        load_checkpoint(make_model(), tmp_path)
    for name in ("empty.pt", "empty.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match="is empty"):
            load_checkpoint(make_model(), tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_checkpoint(make_model(), tmp_path / "other.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_any_torn_file_is_told_in_a_sentence(tmp_path, suffix):
    whole = tmp_path / f"whole.{suffix}"
    weights = dict(make_model().network.state_dict())
    (save_file if suffix == "safetensors" else torch.save)(weights, whole)
    content = whole.read_bytes()
    foreign = [b"hello world", bytes(range(256)), b"\x80\x02.", b"PK\x03\x04", content[1:]]
    for bad in [content[: len(content) * part // 8] for part in range(1, 8)] + foreign:
        path = tmp_path / f"bad.{suffix}"
        path.write_bytes(bad)
        with pytest.raises(UserError) as error:
            load_checkpoint(make_model(), path)
        assert "\n" not in str(error.value)

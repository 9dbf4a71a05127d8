from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.models import (
    MLP,
    Normalized,
    PreActResNet18,
    ResNet,
    SmallCNN,
    build_model,
    check_model,
    model_key,
    pixel_statistics,
)
from robustbench_local.models.preact_resnet import PreActBlock
from robustbench_local.models.resnet import Block

CONF = Path(__file__).parents[2] / "conf" / "model"


def make_data(shape=(1, 28, 28), classes=10, n=20):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(n) % classes, torch.arange(n))
    return SimpleNamespace(train=split, test=split, input_shape=shape, num_classes=classes)


class Viewing(nn.Module):
    """A user's own network, with the arguments it needs and a `view`."""

    def __init__(self, num_classes: int, depth: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, depth, 3)
        self.head = nn.Linear(depth * 26 * 26, num_classes)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


def viewing(**arguments):
    return {"_target_": f"{__name__}.Viewing", "checkpoint": None, **arguments}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 37, 21)])
@pytest.mark.parametrize("name", ["small_cnn", "mlp", "preact_resnet18", "resnet8", "resnet20"])
def test_every_file_builds_a_model_that_keeps_the_contract(name, shape):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    if name == "preact_resnet18":
        config["width"] = 8
    data = make_data(shape, classes=7)
    model = build_model(config, data)
    check_model(model, data, "cpu")
    assert isinstance(model, Normalized)


def test_custom_file_leaves_the_target_open():
    config = yaml.safe_load((CONF / "custom.yaml").read_text())
    assert config["_target_"] == "???" and set(config) == {"_target_", "checkpoint", "mean", "std"}


def test_a_users_class_gets_what_it_names():
    model = build_model(viewing(depth=3), make_data(classes=4))
    assert model.network.conv.out_channels == 3 and model.network.head.out_features == 4
    check_model(model, make_data(classes=4), "cpu")


def test_a_function_is_a_target_and_what_is_given_is_kept():
    config = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2}
    assert isinstance(build_model(config, make_data()).network, nn.Linear)
    model = build_model(viewing(num_classes=99), make_data())
    assert model.network.head.out_features == 99


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_target_": "nowhere.Net"}, r"model\._target_=nowhere\.Net cannot be imported"),
        ({"_target_": "torch.nn.Nothing"}, "cannot be imported"),
        ({"_target_": "???"}, "cannot be imported"),
        ({"_target_": "math.pi"}, "not callable"),
        ({"_target_": "builtins.dict"}, "returned a dict"),
        (viewing(depht=2), "depht.*depth"),
        (
            {"_target_": "robustbench_local.models.SmallCNN", "width": -1},
            "could not be built: .*-1",
        ),
        ({"_target_": "robustbench_local.models.ResNet", "depth": 9}, r"^model\.depth=9; expected"),
        (viewing(mean=[0.1, 0.2]), "2 values and the images have 1 channels"),
        (viewing(std=[0.0]), r"model\.std=\[0\.0\]"),
    ],
)
def test_wrong_configurations_are_told_in_a_sentence(config, words):
    with pytest.raises(UserError, match=words) as error:
        build_model(config, make_data())
    assert "\n" not in str(error.value)


def failing():
    """Somebody's own class with a defect."""
    raise RuntimeError("a defect")


def test_a_defect_in_ones_own_class_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"^a defect$"):
        build_model({"_target_": f"{__name__}.failing"}, make_data())


def test_statistics_are_exact():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (50, 3, 9, 8), dtype=torch.uint8, generator=generator)
    images[:, 2] = 128
    mean, std = pixel_statistics(images)
    x = images.double() / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-12)
    expected = x.std((0, 2, 3), correction=0).tolist()
    assert std == pytest.approx([*expected[:2], 1.0], abs=1e-12)


def test_normalisation_comes_first():
    model = build_model(viewing(mean=[0.25], std=[0.5]), make_data())
    x = torch.rand(2, 1, 28, 28)
    assert torch.allclose(model(x), model.network((x - 0.25) / 0.5), atol=1e-6)
    own = build_model(viewing(mean=[0], std=[1]), make_data())
    assert torch.equal(own(x), own.network(x))
    assert "normalize.mean" in model.state_dict()


def test_the_key_follows_configuration_code_and_checkpoint(tmp_path):
    base = model_key(viewing())
    assert base == model_key(viewing())
    assert base["code"] != model_key({"_target_": "robustbench_local.models.MLP"})["code"]
    assert base != model_key(viewing(depth=2))
    (tmp_path / "w.pt").write_bytes(b"1")
    one = model_key({**viewing(), "checkpoint": str(tmp_path / "w.pt")})
    (tmp_path / "w.pt").write_bytes(b"2")
    assert one != model_key({**viewing(), "checkpoint": str(tmp_path / "w.pt")})


class Fixed(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (torch.zeros(2, 5), r"shape \(2, 5\).*expected float logits of shape \(2, 10\)"),
        (torch.zeros(2, 10, dtype=torch.int64), "int64"),
        (torch.full((2, 10), torch.nan), "NaN"),
        ((torch.zeros(2, 10), None), "tuple"),
    ],
)
def test_a_broken_contract_is_told(answer, words):
    with pytest.raises(UserError, match=words):
        check_model(Fixed(answer), make_data(), "cpu")


def test_a_model_for_other_images_is_told_and_no_trace_is_left():
    model = build_model(viewing(), make_data())
    model.conv = nn.BatchNorm2d(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"fails on images of shape \(2, 1, 20, 20\)"):
        check_model(model, make_data((1, 20, 20)), "cpu")
    check_model(model, make_data(), "cpu")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_small_cnn_is_the_papers_network():
    model = SmallCNN(input_shape=(1, 28, 28), num_classes=10, width=16, hidden=100)
    # 16*16+16, 32*16*16+32, 100*1568+100, 10*100+10: counted by hand from the paper.
    assert sum(weight.numel() for weight in model.parameters()) == 272 + 8224 + 156900 + 1010
    with pytest.raises(UserError, match="at least 4x4"):
        SmallCNN(input_shape=(1, 3, 3), num_classes=2)


def test_mlp_without_hidden_layers_is_linear():
    model = MLP(input_shape=(2, 3, 4), num_classes=5, hidden=())
    x = torch.rand(6, 2, 3, 4)
    linear = model.layers[1]
    assert torch.allclose(model(x), x.reshape(6, 24) @ linear.weight.T + linear.bias)
    assert len(MLP(input_shape=(1, 2, 2), num_classes=2, hidden=[3, 4]).layers) == 6


def test_preact_resnet18_has_the_published_size():
    model = PreActResNet18(input_shape=(3, 32, 32), num_classes=10)
    # The usual implementation has 11,171,146 weights; the paper's last norm, left out there, 1,024.
    assert sum(weight.numel() for weight in model.parameters()) == 11_171_146 + 2 * 512


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_resnets_have_the_published_sizes(depth, millions):
    model = ResNet(input_shape=(3, 32, 32), num_classes=10, depth=depth)
    weights = sum(weight.numel() for weight in model.parameters())
    # Table 6 of the paper, to its two digits.
    assert weights / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1 else 0.005)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [2, 7, 9, 18, -4])
def test_depths_that_resnets_do_not_come_in_are_told(depth):
    with pytest.raises(UserError, match=rf"model\.depth={depth}; expected 6n \+ 2"):
        ResNet(input_shape=(3, 32, 32), num_classes=10, depth=depth)


def test_resnet_blocks_with_silent_convolutions_pass_the_image_on():
    same, fewer = Block(4, 4).eval(), Block(4, 8).eval()
    for block in (same, fewer):
        nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(same(x), x)
    halved = fewer(x)
    assert torch.equal(halved[:, :4], x[:, :, ::2, ::2])
    assert halved.shape == (2, 8, 3, 3) and not halved[:, 4:].any()


def test_a_preact_block_with_silent_convolutions_is_the_identity():
    block = PreActBlock(4, 4, stride=1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)
    assert PreActBlock(4, 8, stride=2)(x).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18", "resnet8"])
def test_both_memory_formats_compute_the_same(name):
    config = {**yaml.safe_load((CONF / f"{name}.yaml").read_text()), "width": 8}
    model = build_model(config, make_data((3, 16, 16))).eval()
    x = torch.rand(2, 3, 16, 16)
    weight = next(w for w in model.parameters() if w.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    contiguous = build_model(config, make_data((3, 16, 16))).eval()
    contiguous.load_state_dict(model.state_dict())
    contiguous.to(memory_format=torch.contiguous_format)
    assert torch.allclose(model(x), contiguous(x), atol=1e-5)

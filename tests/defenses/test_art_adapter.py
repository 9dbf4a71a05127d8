import logging
import random
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from art.defences import preprocessor as theirs

from robustbench_local.defenses import ArtPreprocessor, Defense, Jpeg, TotalVariation, art_adapter
from robustbench_local.defenses.median import median_filter
from robustbench_local.errors import UserError


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def images(request, digit_images):
    """Real strokes, of a size that is neither square nor of whole blocks; channels differ."""
    x = digit_images[0][:6, :, 3:26, 4:24]
    return x if request.param == 1 else torch.cat((x, x.flip(3), 0.7 * x.roll(1, 0)), 1)


def channels_last(transform, x):
    """What ART makes of the images in its own order of axes, where nothing can go wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = transform(x.permute(0, 2, 3, 1).numpy().copy())[0]
    return torch.from_numpy(np.asarray(made)).permute(0, 3, 1, 2).float()


def gradient(module, x, weight):
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((module(x) * weight).sum(), x)
    return found


@pytest.mark.parametrize(
    ("name", "kwargs", "direct"),
    [
        ("JpegCompression", {"quality": 30}, lambda: theirs.JpegCompression((0, 1), quality=30)),
        ("SpatialSmoothing", {"window_size": 3}, lambda: theirs.SpatialSmoothing(3)),
        ("FeatureSqueezing", {"bit_depth": 2}, lambda: theirs.FeatureSqueezing((0, 1), 2)),
        # Without random pixels left out it is deterministic.
        ("TotalVarMin", {"prob": 1.0, "max_iter": 3}, lambda: theirs.TotalVarMin(1.0, max_iter=3)),
    ],
)
def test_the_result_is_arts_own(images, name, kwargs, direct):
    module = ArtPreprocessor(name=name, kwargs=kwargs)
    out, expected = module(images), channels_last(direct(), images)
    assert not module.randomized
    assert out.shape == images.shape and out.dtype == torch.float32
    assert torch.allclose(out, expected.clamp(0, 1), atol=1e-6)
    assert not torch.allclose(out, images, atol=0.05)  # it did something
    assert torch.equal(module(images.double()).float(), out)


def test_axes_in_the_wrong_order_would_be_seen(images):
    """The same calls on our order give something else: the test above can fail."""
    wrong = theirs.SpatialSmoothing(3)(images.numpy())[0]
    assert not np.allclose(wrong, ArtPreprocessor(name="SpatialSmoothing")(images).numpy())
    total = theirs.TotalVarMin(1.0, max_iter=3)(images.numpy())[0]
    ours = ArtPreprocessor(name="TotalVarMin", kwargs={"prob": 1.0, "max_iter": 3})(images)
    assert not np.allclose(total, ours.numpy(), atol=1e-3)


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_its_jpeg_is_ours(images, quality):
    # It cuts off to 8 bits where ours rounds: a quarter of a level is clear of both.
    levels = (images * 255).round().clamp(0, 254)
    x = (levels + 0.25) / 255
    module = ArtPreprocessor(kwargs={"quality": quality})
    assert torch.equal(module(x), Jpeg(quality=quality)(levels / 255))
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    ours = Jpeg(quality=quality)
    assert torch.equal(gradient(module, x, weight), gradient(ours, x, weight))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_its_median_is_ours(images, size):
    module = ArtPreprocessor(name="SpatialSmoothing", kwargs={"window_size": size})
    ours = median_filter(images, size)
    assert torch.equal(module(images), ours)
    weight = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    found = gradient(module, images, weight)
    assert torch.equal(found, gradient(lambda x: median_filter(x, size), images, weight))
    assert not torch.equal(found, weight)


def test_its_total_variation_is_attacked_through_a_smooth_one(images):
    module = ArtPreprocessor(name="TotalVarMin", kwargs={"max_iter": 2})
    weight = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    smooth = gradient(TotalVariation(), images, weight)
    assert torch.equal(gradient(module, images, weight), smooth)
    assert not torch.equal(smooth, weight)


def test_gaussian_noise_at_prediction(images):
    """By default it doubles the batch, and is off at prediction."""
    module = ArtPreprocessor(name="GaussianAugmentation", kwargs={"sigma": 0.1})
    assert module.randomized
    x = torch.full((200, *images.shape[1:]), 0.5)
    out = module(x)
    assert out.shape == x.shape
    assert (out - x).std().item() == pytest.approx(0.1, rel=0.02)
    assert abs((out - x).mean().item()) < 0.002
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gradient(module, x, weight), weight)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("GaussianAugmentation", {"sigma": 0.2}),
        ("TotalVarMin", {"prob": 0.3, "max_iter": 2}),
        ("Cutout", {"length": 6}),
        ("CutoutPyTorch", {"length": 6}),
    ],
)
def test_draws_are_seeded_and_leave_no_trace(images, name, kwargs):
    module = ArtPreprocessor(name=name, kwargs=kwargs)
    assert module.randomized and module.eot_samples == 20
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    module.reseed(4)
    first, second = module(images), module(images)
    after = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    assert before[0] == after[0] and (before[1] == after[1]).all()
    assert torch.equal(before[2], after[2])
    assert not torch.equal(first, second)
    np.random.seed(99)
    module.reseed(4)
    assert torch.equal(module(images), first) and torch.equal(module(images), second)
    victims = [Defense(wrap={"art": module}).apply(torch.nn.Flatten()) for _ in range(2)]
    assert torch.equal(victims[0](images), victims[1](images))


def test_without_noise_nothing_is_random():
    kwargs = {"sigma": 0.0}
    assert not ArtPreprocessor(name="GaussianAugmentation", kwargs=kwargs).randomized


def test_draws_that_cannot_be_seeded_are_refused(monkeypatch):
    class Restless(theirs.Preprocessor):
        def __call__(self, x, y=None):
            return np.random.default_rng().random(x.shape, np.float32), y

    monkeypatch.setattr(theirs, "Restless", Restless, raising=False)
    with pytest.raises(UserError, match="cannot be seeded"):
        ArtPreprocessor(name="Restless")


def test_classes_in_pytorch_bring_their_gradient(images):
    module = ArtPreprocessor(name="CutoutPyTorch", kwargs={"length": 8})
    x = images.clamp_min(0.1).requires_grad_()
    out = module(x)
    (found,) = torch.autograd.grad(out.sum(), x)
    # Nothing comes through the hole of this very draw, and all the rest does.
    assert torch.equal(found, (out != 0).float()) and 0 < found.mean() < 1


def test_results_that_are_no_images_are_told(monkeypatch, images):
    class Made(theirs.Preprocessor):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def __call__(self, x, y=None):
            return {"crop": x[:, 1:], "wide": 2 * x + 1, "nan": x / 0 * 0}[self.kind], y

    monkeypatch.setattr(theirs, "Made", Made, raising=False)
    for kind, told in (("crop", "expected the same shape"), ("wide", "from 1"), ("nan", "nan")):
        with pytest.raises(UserError, match=told), np.errstate(all="ignore"):
            ArtPreprocessor(name="Made", kwargs={"kind": kind})(images)


def test_what_cannot_work_is_refused_with_the_reason():
    for name, reason in {
        "Mixup": "labels", "LabelSmoothing": r"train\.label_smoothing", "PixelDefend": "PixelCNN",
        "Mp3Compression": "sound", "VideoCompressionPyTorch": "video", "Resample": "sound",
        "SpatialSmoothingTensorFlowV2": "TensorFlow", "ThermometerEncoding": "channels",
    }.items():  # fmt: skip
        with pytest.raises(
            UserError, match=rf"defense\.wrap\.art\.name={name} is refused.*{reason}"
        ):
            ArtPreprocessor(name=name)


def test_every_class_of_art_works_or_is_refused():
    names = {
        name
        for name, kind in vars(theirs).items()
        if isinstance(kind, type)
        and issubclass(kind, theirs.Preprocessor)
        and name != "Preprocessor"
    }
    assert set(art_adapter.REFUSED) < names
    x = torch.rand((2, 1, 12, 10), generator=torch.Generator().manual_seed(0))
    usable = names - set(art_adapter.REFUSED)
    assert {"JpegCompression", "SpatialSmoothing", "FeatureSqueezing", "TotalVarMin"} <= usable
    if find_spec("kornia") is None:  # which ART does not declare either
        usable.remove("SpatialSmoothingPyTorch")
    for name in usable:
        kwargs = {"length": 4} if name.startswith("Cutout") else {}
        assert ArtPreprocessor(name=name, kwargs=kwargs)(x).shape == x.shape


def test_wrong_names_and_settings_are_told():
    with pytest.raises(UserError, match=r"Cutout, .*TotalVarMin.*name=JpegCompression$"):
        ArtPreprocessor(name="jpeg_compresion")
    told = r"kwargs\.qualty is not a parameter.*quality: type defense\.wrap\.art\.kwargs\.quality="
    with pytest.raises(UserError, match=told):
        ArtPreprocessor(kwargs={"qualty": 50})
    for key in ("channels_first", "clip_values", "apply_predict", "apply_fit"):
        with pytest.raises(UserError, match=rf"kwargs\.{key} is set by the benchmark"):
            ArtPreprocessor(kwargs={key: True})
    with pytest.raises(UserError, match=r"no default for length; type .*kwargs\.length=VALUE"):
        ArtPreprocessor(name="Cutout")
    for quality in (0, 101, 75.5):
        told = (
            r"ValueError: Image quality must be .*: type defense\.wrap\.art\.kwargs\.quality=VALUE"
        )
        with pytest.raises(UserError, match=told):
            ArtPreprocessor(kwargs={"quality": quality})


def test_a_missing_package_is_told(monkeypatch):
    class Needy(theirs.Preprocessor):
        def __call__(self, x, y=None):
            import a_package_that_nobody_has  # noqa: F401

    monkeypatch.setattr(theirs, "Needy", Needy, raising=False)
    with pytest.raises(UserError, match="pip install a_package_that_nobody_has"):
        ArtPreprocessor(name="Needy")


def test_art_stays_silent(capsys, images):
    level = logging.getLogger("art").level
    ArtPreprocessor(name="GaussianAugmentation")(images)
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("art").level == level

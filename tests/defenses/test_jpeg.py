import io

import numpy as np
import pytest
import torch
from conftest import accuracy, train
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.stats import chisquare
from sklearn.datasets import load_sample_images
from torch import nn

from robustbench_local.attacks import PGD
from robustbench_local.defenses import Defense, Jpeg, JpegRandom, JpegSlq, JpegVote
from robustbench_local.defenses.jpeg_codec import compress, differentiable
from robustbench_local.errors import UserError
from robustbench_local.threat import ThreatModel

QUALITIES = (20, 40, 60, 80)


def written_steps(quality):
    """The quantisation steps of luminance that Pillow writes, (8, 8)."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "jpeg", quality=quality)
    return np.array(Image.open(file).quantization[0]).reshape(8, 8)


@pytest.fixture(scope="module")
def photographs():
    """520 patches of two photographs as float32 pixels, 32x32, and which they are from, mixed."""
    patches = [
        torch.from_numpy(image.copy())[:416]
        .permute(2, 0, 1)
        .unfold(1, 32, 32)
        .unfold(2, 32, 32)
        .permute(1, 2, 0, 3, 4)
        .reshape(-1, 3, 32, 32)
        for image in load_sample_images().images
    ]
    order = torch.randperm(520, generator=torch.Generator().manual_seed(0))
    x = torch.cat(patches).float() / 255
    return x[order], torch.arange(2).repeat_interleave(260)[order]


@pytest.fixture(scope="module")
def photograph_model(photographs):
    x, y = photographs
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 64, 64),
            nn.ReLU(),
            nn.Linear(64, 2),
        )
    model = train(model, x[100:], y[100:], epochs=20, batch_size=50)
    assert accuracy(model, x[:100], y[:100]) >= 0.95
    return model


@pytest.fixture(params=["digits", "photographs", "odd"])
def images(request, digit_images, photographs):
    """Real images of one and of three channels, and a size that no block fits."""
    if request.param == "digits":
        return digit_images[0][:24]
    return photographs[0][:12, :, :21, :26] if request.param == "odd" else photographs[0][:12]


def pillow(x, quality):
    """Image by image through Pillow, from pixels that are whole numbers of 255."""
    decoded = []
    for image in (x * 255).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(
            file, "jpeg", quality=quality
        )
        decoded.append(np.array(Image.open(file)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255


def same(quality, x):
    return torch.full((len(x),), quality)


def gradient(module, x, weight):
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((module(x) * weight).sum(), x)
    return found


def noise(shape, seed=0):
    """Random levels as pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).float() / 255


def test_the_codec_is_pillows_bit_for_bit(images):
    for quality in range(1, 101):
        assert torch.equal(Jpeg(quality=quality)(images[:6]), pillow(images[:6], quality))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_hardest_images(channels):
    """Full contrast: coefficients at their largest, decoded values far outside 0 to 255."""
    x = (noise((6, channels, 24, 24)) > 0.5).float()
    x[0, :, ::2, ::2] = x[0, :, 1::2, 1::2] = 1
    x[0, :, 1::2, ::2] = x[0, :, ::2, 1::2] = 0
    x[1, :, :, ::2], x[1, :, :, 1::2] = 1, 0
    for quality in range(1, 101):
        assert torch.equal(Jpeg(quality=quality)(x), pillow(x, quality))


@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_that_no_block_fits(channels):
    for height in (1, 2, 5, 7, 8, 15, 16, 17, 18):
        for width in (1, 2, 3, 4, 5, 6, 9, 16, 22, 31):
            x = noise((2, channels, height, width), seed=height)
            assert torch.equal(Jpeg(quality=30)(x), pillow(x, 30)), (height, width)


def test_pixels_are_rounded_to_8_bits_first(images):
    module = Jpeg(quality=90)
    assert torch.equal(module((images + 0.4 / 255).clamp(0, 1)), module(images))


def test_type_device_and_empty_batches(images):
    for module in (Jpeg(), JpegRandom(), JpegSlq()):
        out = module(images.double())
        assert out.dtype == torch.float64 and out.shape == images.shape
        assert out.min() >= 0 and out.max() <= 1
        assert module(images[:0].requires_grad_()).shape == images[:0].shape


@pytest.mark.parametrize("quality", [10, 20, 50, 75, 90])
def test_the_stand_in_is_close_to_the_codec(images, quality):
    exact = pillow(images, quality)
    apart = (differentiable(images, same(quality, images)).clamp(0, 1) - exact).square().mean()
    # The identity is as far from the codec as the codec's result from its input.
    assert apart.sqrt() <= 0.35 * (images - exact).square().mean().sqrt()


def test_one_quality_per_image(photographs):
    x = photographs[0][:8]
    qualities = torch.tensor([1, 90, 30, 90, 49, 50, 51, 100])
    for code in (compress, differentiable):
        together = code(x, qualities)
        for row, quality in enumerate(qualities.tolist()):
            alone = code(x[row : row + 1], torch.tensor([quality]))
            assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_the_gradient_of_the_stand_in():
    """One block of luminance by hand: back through the transform, each coefficient weighed."""
    x, weight = noise((1, 1, 8, 8)), noise((1, 1, 8, 8), seed=1) - 0.5
    values = dctn(x[0, 0].numpy() * 255 - 128, norm="ortho") / written_steps(50)
    slopes = 0.05 + 0.95 * 3 * (values - values.round()) ** 2
    expected = idctn(slopes * dctn(weight[0, 0].numpy(), norm="ortho"), norm="ortho")
    found = gradient(lambda x: differentiable(x, same(50, x)), x, weight)
    assert np.allclose(found[0, 0], expected, atol=0.005) and np.abs(expected).max() > 0.2


def test_the_gradient_of_grey_images_with_three_channels(digit_images):
    """Their differences of colour are 0 and stay so: one plane, three times."""
    x = digit_images[0][:4]
    weight = noise(x.shape) - 0.5
    grey = gradient(lambda x: differentiable(x, same(50, x)), x, weight)
    three = gradient(lambda x: differentiable(x.expand(-1, 3, -1, -1), same(50, x)), x, weight)
    assert torch.allclose(three, 3 * grey, atol=0.01) and grey.abs().max() > 0.3


def test_black_and_white_paper_have_a_gradient():
    """All their coefficients lie on whole numbers, where rounding after Shin and Song has none."""
    weight = noise((1, 1, 16, 16)) - 0.5
    for channels in (1, 3):
        for level in (0.0, 1.0):
            x = torch.full((1, channels, 16, 16), level)
            found = gradient(Jpeg(quality=50), x, weight.expand_as(x))
            assert found.isfinite().all() and (found != 0).all()
    grey = gradient(Jpeg(quality=50), torch.full((1, 1, 16, 16), 128 / 255), weight)
    assert torch.allclose(grey, 0.05 * weight, atol=1e-5)  # all coefficients 0: the floor alone


def test_gradients_are_the_stand_ins(images):
    weight = noise(images.shape)
    expected = gradient(lambda x: differentiable(x, same(30, x)), images, weight)
    assert torch.equal(gradient(Jpeg(quality=30), images, weight), expected)
    assert torch.equal(gradient(Jpeg(quality=30, surrogate="identity"), images, weight), weight)
    exact = pillow(images, 30)
    assert torch.equal(Jpeg(quality=30)(images.clone().requires_grad_()), exact)


def test_mixed_precision_changes_nothing(images):
    weight, x = noise(images.shape), images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = Jpeg(quality=30)(x)
    (found,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(out, pillow(images, 30))
    assert torch.equal(found, gradient(Jpeg(quality=30), images, weight))


def test_random_qualities_are_drawn_for_every_image(photographs):
    x = photographs[0][:1].repeat(400, 1, 1, 1)
    decoded = [pillow(x[:1], quality) for quality in QUALITIES]
    module = JpegRandom(qualities=QUALITIES)
    module.reseed(1)
    out = module(x)
    counts = [int((out == each).flatten(1).all(1).sum()) for each in decoded]
    assert sum(counts) == 400 and chisquare(counts).pvalue > 0.01
    module.reseed(1)
    assert torch.equal(module(x), out)
    assert not torch.equal(module(x), out)


@pytest.mark.parametrize("size", [(32, 32), (21, 27)])
def test_slq_takes_every_block_from_one_of_the_decoded_images(photographs, size):
    x = photographs[0][:300, :, : size[0], : size[1]]
    module = JpegSlq(qualities=QUALITIES)
    module.reseed(3)
    out = module(x)
    decoded = torch.stack([pillow(x, quality) for quality in QUALITIES])
    counts = torch.zeros(4)
    for top in range(0, size[0], 8):
        for left in range(0, size[1], 8):
            block = (..., slice(top, top + 8), slice(left, left + 8))
            fits = (decoded[block] == out[block]).flatten(2).all(2)  # (4, N): all channels at once
            assert fits.any(0).all()
            # Where two qualities leave the same, nobody can say which one it was.
            counts += fits[:, fits.sum(0) == 1].sum(1)
    assert counts.sum() > 0.9 * 300 * (-(-size[0] // 8)) * (-(-size[1] // 8))
    assert chisquare(counts).pvalue > 0.01
    module.reseed(3)
    assert torch.equal(module(x), out)
    assert not torch.equal(module(x), out)


def test_the_gradient_of_slq_is_that_of_whole_files_block_by_block(images):
    module, x = JpegSlq(), images[:8]
    module.reseed(5)
    drawn = module.draw(x)
    pixels = drawn.repeat_interleave(8, 1).repeat_interleave(8, 2)
    pixels = pixels[:, None, : x.shape[2], : x.shape[3]]

    def patchwork(x):
        files = [differentiable(x, same(quality, x)) for quality in QUALITIES]
        return sum(file * (pixels == place) for place, file in enumerate(files))

    weight = noise(x.shape)
    found = gradient(lambda x: module.surrogate_of(x, drawn), x, weight)
    expected = gradient(patchwork, x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_slq_on_digits(digit_images):
    x = digit_images[0][:20]
    out, decoded = JpegSlq()(x), torch.stack([pillow(x, each) for each in QUALITIES])
    assert (decoded == out).any(0).all()
    assert not (decoded == out).flatten(1).all(1).any()


@pytest.mark.parametrize("kind", [JpegRandom, JpegSlq])
def test_the_stand_in_meets_the_draw_of_the_transform(photographs, kind):
    x = photographs[0][:6]
    weight = noise(x.shape)
    module = kind(qualities=(5, 95))
    module.reseed(0)
    drawn = module.draw(x)
    module.reseed(0)
    found = gradient(module, x, weight)
    expected = gradient(lambda x: module.surrogate_of(x, drawn), x, weight)
    assert torch.equal(found, expected)
    assert not torch.equal(gradient(module, x, weight), expected)  # the next draw
    module.reseed(0)
    module(x)
    module.reseed(0)
    assert torch.equal(gradient(module.surrogate, x, weight), expected)


@pytest.mark.parametrize("kind", [JpegRandom, JpegSlq])
def test_draws_come_from_the_modules_own_generator(digit_images, kind):
    state = torch.get_rng_state()
    kind()(digit_images[0][:4])
    assert torch.equal(state, torch.get_rng_state())


def test_the_vote_is_the_mean_of_the_probabilities(digit_model, digit_images):
    x = digit_images[0][:30]
    victim = JpegVote(qualities=(5, 50, 90))(digit_model)
    passes = [digit_model(pillow(x, quality)).softmax(1) for quality in (5, 50, 90)]
    expected = sum(passes) / 3
    assert torch.allclose(victim(x).exp(), expected, atol=1e-6)
    assert torch.allclose(victim(x).softmax(1), expected, atol=1e-6)
    assert not any(torch.allclose(each, expected, atol=1e-3) for each in passes)


def test_the_vote_keeps_its_gradient_where_the_network_is_sure(digit_model, digit_images):
    class Sure(nn.Module):
        def forward(self, x):
            return 100 * digit_model(x)

    x = digit_images[0][:10].clone().requires_grad_()
    logits = JpegVote()(Sure())(x)
    margin = logits[:, 0] - logits[:, 1]
    (found,) = torch.autograd.grad(margin.sum(), x)
    assert logits.isfinite().all() and found.isfinite().all()
    assert (found.flatten(1).abs().sum(1) > 0).all()


def attacked(wrap, model, x, y, *, epsilon, steps=10, eot_samples=1):
    """Accuracy behind a wrap, under an attack on the model alone and one that sees the wrap."""
    threat = ThreatModel(norm="linf", epsilon=epsilon)
    attack = PGD(steps=steps, step_size=0.25, eot_samples=eot_samples)
    victim = Defense(wrap={"jpeg": wrap}).apply(model)
    ignoring = PGD(steps=steps, step_size=0.25)(model, x, y, threat)
    return accuracy(victim, ignoring, y), accuracy(victim, attack(victim, x, y, threat), y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "eot_samples"),
    [
        (Jpeg(quality=20), 1),
        (Jpeg(quality=20, surrogate="identity"), 1),
        (JpegRandom(), 5),
        (JpegSlq(), 5),
        (JpegVote(), 1),
    ],
    ids=["jpeg", "identity", "random", "slq", "vote"],
)
def test_nothing_is_left_of_an_undefended_network(digit_model, digit_images, wrap, eot_samples):
    x, y = (part[:50] for part in digit_images)
    victim = Defense(wrap={"jpeg": wrap}).apply(digit_model)
    assert accuracy(victim, x, y) >= 0.9
    _, adaptive = attacked(wrap, digit_model, x, y, epsilon=0.3, eot_samples=eot_samples)
    assert adaptive <= 0.02
    # At half the budget it shows that the defense stops those who do not know it.
    ignoring, adaptive = attacked(wrap, digit_model, x, y, epsilon=0.15, eot_samples=eot_samples)
    assert adaptive + 0.1 <= ignoring


def test_the_default_stand_in_breaks_what_the_identity_leaves(photograph_model, photographs):
    x, y = (part[:100] for part in photographs)
    ignoring, left = attacked(
        Jpeg(quality=20, surrogate="identity"), photograph_model, x, y, epsilon=32 / 255
    )
    _, adaptive = attacked(Jpeg(quality=20), photograph_model, x, y, epsilon=32 / 255)
    assert adaptive + 0.1 <= left <= ignoring - 0.1


@pytest.mark.parametrize("quality", [0, 101, -1, 75.5, 75.0, "75", True, None])
def test_a_quality_that_is_none_is_told(quality):
    with pytest.raises(UserError, match=r"1 to 100: type defense\.wrap\.jpeg\.quality=75"):
        Jpeg(quality=quality)
    for kind in (JpegRandom, JpegSlq, JpegVote):
        with pytest.raises(UserError, match=r"qualities=\[20, .*type defense\.wrap\.NAME\.qual"):
            kind(qualities=[20, quality])


def test_other_settings_that_are_none_are_told():
    for qualities in ([], 75, "20"):
        for kind in (JpegRandom, JpegSlq, JpegVote):
            with pytest.raises(UserError, match="one or more whole numbers"):
                kind(qualities=qualities)
    for kind in (Jpeg, JpegRandom, JpegSlq, JpegVote):
        with pytest.raises(UserError, match=r"surrogate=kornia.*differentiable or identity"):
            kind(surrogate="kornia")
    for samples in (0, 1.5, True):
        with pytest.raises(UserError, match=r"eot_samples=.*whole number, 1 or more"):
            JpegSlq(eot_samples=samples)
    for call in (Jpeg(), JpegSlq()):
        with pytest.raises(UserError, match="4 channels"):
            call(torch.zeros(1, 4, 8, 8))

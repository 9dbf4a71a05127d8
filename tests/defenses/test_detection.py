"""Detectors: the threshold, the logit of rejection, and feature squeezing as it was published."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from robustbench_local.attacks import PGD, Attack
from robustbench_local.data import Dataset, Split
from robustbench_local.defenses import (
    RSE,
    BitDepth,
    Calibration,
    Defense,
    Detecting,
    Detector,
    FeatureSqueezingDetector,
    JpegVote,
    Median,
    NoiseFusion,
    Preprocess,
    RandomizedSmoothing,
    Scorer,
    describe_detection,
)
from robustbench_local.defenses.averaged import Averaged
from robustbench_local.defenses.detection import settle
from robustbench_local.defenses.feature_squeezing_detector import log_odds_distance
from robustbench_local.errors import UserError
from robustbench_local.evaluation import Judging, evaluate
from robustbench_local.oracle import Oracle
from robustbench_local.results.metrics import measure_detection
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, Trained, Workshop

CPU = torch.device("cpu")


class Brightness(Scorer):
    """The mean pixel."""

    def forward(self, model: nn.Module, x: Tensor, logits: Tensor) -> Tensor:
        return x.flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class BrightnessDetector(Detector):
    called: ClassVar[str] = "brightness"

    def scorer(self) -> Scorer:
        return Brightness()


class Darker(Preprocess):
    differentiable = True

    def transform(self, x: Tensor) -> Tensor:
        return x / 2


class Noise(Preprocess):
    randomized = True
    differentiable = True

    def transform(self, x: Tensor) -> Tensor:
        draw = torch.rand(x.shape, generator=self.generator(x.device))
        return (x + 0.1 * (draw - 0.5)).clamp(0, 1)


def network() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval().requires_grad_(False)


def split(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(200, (count, 1, 1, 1), generator=generator)
    spread = torch.randint(56, (count, 1, 4, 4), generator=generator)
    return Split((base + spread).to(torch.uint8), torch.arange(count) % 3, torch.arange(count))


def workshop(validation: int = 200, model: nn.Module | None = None) -> Workshop:
    data = Dataset(
        name="greys", source="files", train=split(30, 1), validation=split(validation, 2),
        test=split(30, 3), class_names=("a", "b", "c"), test_total=30, fingerprint="greys",
        test_fingerprint="greys", notes=(),
    )  # fmt: skip
    return make_workshop(data, model or network())


def make_workshop(data: Dataset, model: nn.Module) -> Workshop:
    schedule = Schedule(epochs=1, batch_size=10, learning_rate=0.01)
    return Workshop(
        data=data, device=CPU, cache=None, seed=0, schedule=schedule, build=network,
        model={}, network=Trained.given(model, "0" * 64),
    )  # fmt: skip


def rejected(victim: nn.Module, x: Tensor) -> Tensor:
    logits = victim(x)
    return logits.argmax(1) == logits.shape[1] - 1


@pytest.mark.parametrize(("rate", "expected"), [(0.05, 10), (0.049, 9), (0, 0), (0.5, 100)])
def test_the_share_of_validation_images_that_is_rejected(rate: float, expected: int) -> None:
    given = workshop()
    defense = Defense(wrap={"brightness": BrightnessDetector(false_positive_rate=rate)})
    victim = defense.fit(given).apply(given.network.model)
    x = given.data.validation.pixels(slice(None))
    brightest = x.flatten(1).mean(1).argsort(descending=True)[:expected]
    assert sorted(rejected(victim, x).nonzero().flatten().tolist()) == sorted(brightest.tolist())
    told = describe_detection(victim)
    assert told["validation_images"] == 200 and told["false_positive_rate"] == rate
    assert told["validation_rejected"] == expected / 200


@pytest.mark.parametrize("first", [True, False], ids=["in front", "behind"])
def test_the_threshold_suits_the_whole_defense(first: bool) -> None:
    """Behind a transform a detector sees what that makes of the images, in front of it all."""
    given = workshop()
    parts = {"darker": Darker(), "brightness": BrightnessDetector()}
    wrap = dict(reversed(parts.items())) if first else parts
    fitted = Defense(wrap=wrap).fit(given)
    assert list(fitted.wrap) == list(wrap)
    x = given.data.validation.pixels(slice(None))
    assert rejected(fitted.apply(given.network.model), x).sum() == 10
    alone = Defense(wrap={"brightness": BrightnessDetector()}).fit(given).wrap["brightness"]
    share = 1 if first else 1 / 2
    found = fitted.wrap["brightness"].calibration.threshold
    assert found == pytest.approx(share * alone.calibration.threshold)


def test_the_threshold_of_a_random_defense_comes_from_the_seed() -> None:
    given = workshop(validation=1000)
    defense = Defense(wrap={"noise": Noise(), "brightness": BrightnessDetector()})
    before = torch.get_rng_state()
    first, again = (defense.fit(given).wrap["brightness"].calibration for _ in range(2))
    assert first == again and torch.equal(torch.get_rng_state(), before)
    other = defense.fit(replace(given, seed=1)).wrap["brightness"].calibration
    assert other.threshold != first.threshold
    victim = defense.fit(given).apply(given.network.model)
    share = rejected(victim, given.data.validation.pixels(slice(None))).double().mean()
    assert float(share) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    "averaging",
    [NoiseFusion(), RSE(inner=0.0), JpegVote(), RandomizedSmoothing(at_run_time=False)],
    ids=lambda part: type(part).__name__,
)
def test_a_detector_is_not_averaged_but_looks_at_an_average(averaging: object) -> None:
    """Then the share of validation images that the victim itself rejects is the one it reports."""
    brightness = BrightnessDetector()
    if getattr(averaging, "at_run_time", True):
        for front in ({}, {"dark": Darker()}):
            wrap = {**front, "average": averaging, "brightness": brightness}
            names = ",".join([*front, "brightness", "average"])
            told = rf"average averages several .*wrap\.brightness .*type defense=\[{names}\]$"
            with pytest.raises(UserError, match=told):
                Defense(wrap=wrap)  # type: ignore[arg-type]
    else:
        Defense(wrap={"average": averaging, "brightness": brightness})  # type: ignore[dict-item]
    given = workshop()
    wraps = {"dark": Darker(), "brightness": brightness, "average": averaging}
    fitted = Defense(wrap=wraps).fit(given)  # type: ignore[arg-type]
    x = given.data.validation.pixels(slice(None))
    assert rejected(fitted.apply(given.network.model), x).sum() == 10
    told = describe_detection(fitted.apply(given.network.model))
    assert (told["validation_images"], told["validation_rejected"]) == (200, 0.05)


@pytest.mark.parametrize("names", [["smooth", "brightness"], ["brightness", "smooth"]])
def test_what_certifies_an_average_goes_with_no_detector(names: list[str]) -> None:
    parts = {"smooth": RandomizedSmoothing(), "brightness": BrightnessDetector(), "dark": Darker()}
    told = r"smooth averages and certifies .*brightness can stand neither .*=\[smooth,dark\]$"
    with pytest.raises(UserError, match=told):
        Defense(wrap={name: parts[name] for name in [*names, "dark"]})


def test_an_average_that_does_not_say_so_is_found_when_the_threshold_is_set() -> None:
    def average(model: nn.Module) -> nn.Module:
        return Averaged(model, draws=3)

    defense = Defense(wrap={"mine": average, "brightness": BrightnessDetector()})
    with pytest.raises(UserError, match=r"BrightnessDetector is asked 600 times about 200 images"):
        defense.fit(workshop())


def test_a_threshold_lies_between_two_scores_and_equal_scores_stay_together() -> None:
    assert settle(torch.tensor([3.0, 1, 2, 0]), 0.25) == Calibration(2.5, 0.25, 4, 0.25)
    assert settle(torch.tensor([3.0, 1, 2, 0]), 0.24) == Calibration(3, 0.24, 4, 0)
    # The two 2s would both be rejected, one more than allowed.
    assert settle(torch.tensor([3.0, 2, 2, 0]), 0.5) == Calibration(2.5, 0.5, 4, 0.25)
    assert settle(torch.tensor([1.0, 1, 1, 1]), 0.5) == Calibration(1, 0.5, 4, 0)
    assert settle(torch.zeros(1), 0.05) == Calibration(0, 0.05, 1, 0)
    many = torch.arange(100.0)
    assert settle(many, 0.29).validation_rejected == 0.29  # 0.29 * 100 is 28.999...


class Given(nn.Module):
    """Logits of any size, whatever the image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * x.flatten(1)[:, :1]


def test_the_last_logit_is_the_largest_exactly_above_the_threshold() -> None:
    """Also where the excess is far below the rounding of the logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((600, 1, 2, 2), 0.5) + torch.randint(-3, 4, (600, 1, 1, 1),
                                                        generator=generator) * 2**-24  # fmt: skip
    for scale in (1e-3, 1, 1e4, 1e8):
        logits = (torch.randn(600, 4, generator=generator) - 3) * scale
        victim = Detecting(Given(logits), Brightness(), Calibration(0.5, 0.05, 1, 0))
        answer = victim(x)
        assert torch.equal(answer[:, :4], logits)
        above = x[:, 0, 0, 0] > 0.5
        assert 100 < above.sum() < 500
        assert torch.equal(answer.argmax(1) == 4, above)
        assert torch.equal(answer.argmax(1)[~above], logits.argmax(1)[~above])


def test_its_gradient_is_that_of_the_largest_logit_and_the_score() -> None:
    model = network()
    victim = Detecting(model, Brightness(), Calibration(0.5, 0.05, 1, 0))
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (found,) = torch.autograd.grad(victim(x)[:, 3].sum(), x)
    largest = model(x).argmax(1)
    expected = model[1].weight[largest].view_as(x) + 1 / 16
    torch.testing.assert_close(found, expected)


class Squashed(Preprocess):
    def transform(self, x: Tensor) -> Tensor:
        return (x * 7).round() / 7


def test_the_score_is_the_published_distance(digit_model: nn.Module, digits: Dataset) -> None:
    """Against NumPy and SciPy: the largest L1 distance over the squeezers, in its log-odds form."""
    x = digits.test.pixels(slice(0, 100))
    x = (x + 0.2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    squeezers = {"bits": BitDepth(bits=1), "median": Median(size=2)}
    detector = FeatureSqueezingDetector(squeezers=squeezers)

    def probabilities(images: np.ndarray) -> np.ndarray:
        logits = digit_model(torch.from_numpy(images).float()).double().numpy()
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)

    pixels = x.numpy()
    plain = probabilities(pixels)
    squeezed = (np.rint(pixels), ndimage.median_filter(pixels, (1, 1, 2, 2), mode="reflect"))
    distance = np.max([np.abs(plain - probabilities(s)).sum(1) for s in squeezed], axis=0)
    score = detector.scorer()(digit_model, x, digit_model(x))
    assert distance.min() < 0.01 and distance.max() > 1.5
    np.testing.assert_allclose(2 * torch.sigmoid(score.double()).numpy(), distance, atol=1e-5)


def test_the_score_keeps_its_order_and_gradient_where_the_distance_is_2() -> None:
    gap = torch.tensor([20.0, 30, 60, 300]).double().requires_grad_()
    zero = torch.zeros_like(gap)
    first, second = (torch.stack(pair, 1).log_softmax(1) for pair in ((gap, zero), (zero, gap)))
    assert ((first.exp() - second.exp()).abs().sum(1) > 2 - 1e-8).all()
    score = log_odds_distance(first, second)
    # Half of the overlap is exp(-gap) / (1 + exp(-gap)).
    expected = gap.detach() - np.log(2)
    torch.testing.assert_close(score.detach(), expected, rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(score.sum(), gap)
    torch.testing.assert_close(slope, torch.ones_like(gap), rtol=0, atol=1e-6)


def test_an_image_that_squeezing_leaves_alone_is_least_suspicious() -> None:
    detector = FeatureSqueezingDetector(squeezers={"squashed": Squashed()})
    model, x = network(), torch.rand(4, 1, 4, 4)
    same = (x * 7).round() / 7
    score = detector.scorer()(model, same, model(same))
    assert score.isfinite().all() and (score < detector.scorer()(model, x, model(x))).all()


@pytest.fixture(scope="module")
def squeezed(digits: Dataset, digit_model: nn.Module) -> nn.Module:
    """Three bits and a median: squeezers that a perturbation of linf 0.3 can pass."""
    squeezers = {"bits": BitDepth(bits=3), "median": Median(size=2)}
    detector = FeatureSqueezingDetector(squeezers=squeezers)
    given = make_workshop(digits, digit_model)
    return Defense(wrap={"squeezing": detector}).fit(given).apply(digit_model)


def attacked(faced: nn.Module, judged: nn.Module, attack: Attack, digits: Dataset) -> dict:
    some = Split(digits.test.images[::10], digits.test.labels[::10], digits.test.indices[::10])
    threat = ThreatModel(norm="linf", epsilon=0.3)
    examples = evaluate(
        Oracle(faced, threat, 10), attack, some, batch_size=100, judging=Judging(victim=judged)
    ).examples
    return {"robust": examples.robust_correct.mean(), **measure_detection(examples)}


def test_who_knows_of_the_detector_breaks_it(
    squeezed: nn.Module, digit_model: nn.Module, digits: Dataset
) -> None:
    attack = PGD(steps=40)
    careless = attacked(digit_model, squeezed, attack, digits)
    adaptive = attacked(squeezed, squeezed, attack, digits)
    assert careless["clean_rejected"] == adaptive["clean_rejected"] <= 0.12
    assert careless["fooling_roc_auc"] > 0.8 and careless["robust"] > 0.25
    assert adaptive["robust"] <= 0.05


def test_what_cannot_be_a_detector_is_told() -> None:
    brightness = BrightnessDetector()
    with pytest.raises(UserError, match="the detector has no threshold yet"):
        brightness(network())(torch.rand(1, 1, 4, 4))
    with pytest.raises(UserError, match=r"greys has no validation images and a detector sets its "
                       r"threshold on them; type dataset\.validation_fraction=0\.05"):  # fmt: skip
        Defense(wrap={"brightness": brightness}).fit(workshop(validation=0))
    with pytest.raises(UserError, match=r"2 detectors \(one, two\).*type defense=one"):
        Defense(wrap={"one": brightness, "dark": Darker(), "two": brightness})
    for rate in (-0.1, 1, "half", float("nan"), True):
        with pytest.raises(UserError, match=r"brightness\.false_positive_rate=.*from 0 to below 1"):
            BrightnessDetector(false_positive_rate=rate)
    assert BrightnessDetector(false_positive_rate="1/20").false_positive_rate == 0.05
    with pytest.raises(UserError, match="squeezers is empty"):
        FeatureSqueezingDetector(squeezers={})
    with pytest.raises(UserError, match=r"squeezers\.net is a Sequential; expected a transform"):
        FeatureSqueezingDetector(squeezers={"net": network()})


def test_victims_share_no_draws_and_the_detector_tells_that_it_abstains() -> None:
    given = workshop()
    detector = FeatureSqueezingDetector(squeezers={"noise": Noise()})
    fitted = Defense(wrap={"squeezing": detector}).fit(given)
    assert fitted.abstains and not Defense(wrap={"dark": Darker()}).abstains
    one, two = fitted.apply(given.network.model), fitted.apply(given.network.model)
    reseed = fitted.reseeder(one)
    x = given.data.test.pixels(slice(None))
    reseed(1)
    first, second = one(x), one(x)
    reseed(1)
    assert torch.equal(one(x), first)
    two(x)
    assert torch.equal(one(x), second) and not torch.equal(first, second)
    assert fitted.randomized(one)

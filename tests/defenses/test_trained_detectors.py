"""Detectors that are trained: ours, and ART's by name."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import digit_cnn
from torch import Tensor, nn

from robustbench_local.attacks import PGD
from robustbench_local.attacks.sandbox import sandbox
from robustbench_local.data import Dataset, Split
from robustbench_local.defenses import ArtDetector, Defense, Detector, DetectorNetwork
from robustbench_local.defenses.art_detector import NAMES, REFUSED, art_detector
from robustbench_local.defenses.detector_network import TellApart
from robustbench_local.errors import UserError
from robustbench_local.evaluation import Judging, evaluate
from robustbench_local.gradients import pristine
from robustbench_local.identity import file_sha256
from robustbench_local.oracle import Oracle
from robustbench_local.results.metrics import measure_detection
from robustbench_local.threat import ThreatModel
from robustbench_local.training import Schedule, Trained, Workshop
from robustbench_local.training.step import Step

CPU = torch.device("cpu")
LINF = ThreatModel(norm="linf", epsilon=0.3)
TRAINING = PGD(steps=3, step_size=0.5, early_stop=False, best_iterate=False)

DETECTORS: dict[str, Detector] = {
    "detector": DetectorNetwork(attack=TRAINING, threat=LINF, width=8),
    "input": ArtDetector(attack=TRAINING, threat=LINF, width=8, epochs=4, images=500),
    "activation": ArtDetector(
        attack=TRAINING, threat=LINF, name="BinaryActivationDetector", epochs=60, images=500
    ),
}


def first(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count], split.indices[:count])


@pytest.fixture(scope="module")
def workshop(
    digits: Dataset, digit_model: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Workshop:
    """700 digits to train on, and the network that is to be protected."""
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))
    train = Split(*(part[order[:700]] for part in vars(digits.train).values()))
    return Workshop(
        data=replace(digits, train=train, fingerprint="some digits"),
        device=CPU,
        cache=tmp_path_factory.mktemp("detectors"),
        seed=0,
        schedule=Schedule(epochs=3, batch_size=50, learning_rate=0.01),
        build=digit_cnn,
        model={"model": "digits", "precision": "float32"},
        network=Trained.given(digit_model, "0" * 64),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "area", "robust"),
    # An attack may end with logits that look like any other's.
    [("detector", 0.99, 0.8), ("input", 0.9, 0.5), ("activation", 0.6, 0.1)],
)
def test_it_sees_attacks_that_ignore_it_and_falls_to_those_that_do_not(
    name: str, area: float, robust: float, workshop: Workshop, digits: Dataset,
    digit_model: nn.Module,
) -> None:  # fmt: skip
    fitted = Defense(wrap={name: DETECTORS[name]}).fit(workshop)
    victim = fitted.apply(digit_model)
    some = Split(*(part[::10] for part in vars(digits.test).values()))  # sorted by class
    found = {}
    for awareness, faced in (("oblivious", digit_model), ("adaptive", victim)):
        examples = evaluate(
            Oracle(faced, LINF, 10), PGD(steps=40), some, batch_size=100,
            judging=Judging(victim=victim),
        ).examples  # fmt: skip
        found[awareness] = {"robust": examples.robust_correct.mean(), **measure_detection(examples)}
    careless, adaptive = found["oblivious"], found["adaptive"]
    assert careless["clean_rejected"] < 0.15
    assert careless["fooling"] >= 85 and careless["fooling_roc_auc"] > area
    assert careless["robust"] >= robust and adaptive["robust"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_it_is_trained_once_from_its_seed_alone(
    name: str, workshop: Workshop, tmp_path: Path
) -> None:
    detector, x = DETECTORS[name], workshop.data.test.pixels(slice(0, 20))

    def scores(given: Workshop) -> Tensor:
        classifier = given.network.model
        return detector.fit(given).scorer()(classifier, x, classifier(x))

    once = scores(workshop)
    told = Defense(wrap={"it": detector.fit(workshop)}).learned["it"]
    file = next(path for path in workshop.cache.rglob("*.safetensors") if path.stem == told["key"])
    assert told["sha256"] == file_sha256(file) and told["warnings"] == []
    files = sorted(path for path in workshop.cache.rglob("*.safetensors"))
    changed = [path.stat().st_mtime_ns for path in files]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert torch.equal(scores(workshop), once)
    assert [path.stat().st_mtime_ns for path in files] == changed
    assert sorted(workshop.cache.rglob("*.safetensors")) == files
    # Elsewhere, and whatever the global generators say, the same training ends the same.
    elsewhere = replace(workshop, cache=tmp_path)
    assert torch.equal(scores(elsewhere), once)
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert states[2] == torch.get_rng_state().tolist()
    # Another network to protect, another seed: another detector.
    other = replace(workshop.network, sha256="1" * 64)
    scores(replace(elsewhere, network=other))
    scores(replace(elsewhere, seed=1))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_what_the_network_is_trained_on(workshop: Workshop, digit_model: nn.Module) -> None:
    recipe = TellApart(attack=TRAINING, threat=LINF, victim=digit_model)
    few = replace(
        workshop.data, train=first(workshop.data.train, 6),
        validation=first(workshop.data.validation, 4),
    )  # fmt: skip
    data = recipe.data(few)
    assert data.num_classes == 2 and data.test is few.test
    assert torch.equal(data.train.images, torch.cat([few.train.images] * 2))
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    assert data.validation.labels.tolist() == [0] * 4 + [1] * 4
    clean, broken = data.validation.pixels(slice(0, 4)), data.validation.pixels(slice(4, 8))
    assert torch.equal(data.validation.images[:4], few.validation.images)
    assert torch.equal(broken, recipe.attacked(clean, seed=0))
    # Whole levels, inside the budget but for their rounding, and another class is predicted.
    assert 0.25 < float((broken - clean).abs().max()) <= 0.3 + 0.5 / 255 + 1e-6
    assert (digit_model(broken).argmax(1) != digit_model(clean).argmax(1)).all()
    x, y = data.train.pixels(slice(3, 9)), data.train.labels[3:9]
    seen = []

    def detector(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 2, requires_grad=True)

    def step(number: int) -> Tensor:
        criterion = nn.functional.cross_entropy
        recipe.loss(detector, Step(x, y, criterion, progress=0.5, number=number, seed=0))
        return seen[-1]

    shown = step(7)
    assert torch.equal(shown[:3], x[:3])
    assert torch.equal(shown[3:], (shown[3:] * 255).round() / 255)
    assert (shown[3:] - x[3:]).abs().amax((1, 2, 3)).min() > 0.25
    assert torch.equal(step(7), shown) and not torch.equal(step(8), shown)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_what_arts_own_object_predicts(
    name: str, workshop: Workshop, digit_model: nn.Module
) -> None:
    detector = next(d for d in DETECTORS.values() if getattr(d, "name", "") == name).fit(workshop)
    x = workshop.data.test.pixels(slice(0, 30))
    hooks = [len(part._forward_hooks) for part in digit_model.modules()]
    with pristine(digit_model), sandbox(0, CPU):
        theirs = art_detector(
            name, detector.network, digit_model, workshop.data, CPU, learning_rate=1
        )
        report, flagged = theirs.detect(x.numpy())
    score = detector.scorer()(digit_model, x, digit_model(x))
    predicted = report["predictions"]
    np.testing.assert_allclose(score, predicted[:, 1] - predicted[:, 0], rtol=1e-4, atol=1e-5)
    assert ((score > 0).numpy() == flagged).all()
    assert [len(part._forward_hooks) for part in digit_model.modules()] == hooks


def test_every_detector_of_art_is_served_or_refused_with_a_reason() -> None:
    import art.defences.detector.evasion as theirs

    there = {name for name in vars(theirs) if name.endswith(("Detector", "DetectorPyTorch"))}
    assert there == {*NAMES, *REFUSED}
    for name in REFUSED:
        with pytest.raises(UserError, match=rf"name={name} is refused: it.*; type "):
            ArtDetector(attack=TRAINING, threat=LINF, name=name)
    with pytest.raises(UserError, match=r"not a detector of ART; expected one of BinaryInput"):
        ArtDetector(attack=TRAINING, threat=LINF, name="Magnet")


@pytest.mark.parametrize("name", ["detector", "input"])
def test_nothing_is_trained_that_could_not_be_used(name: str, workshop: Workshop) -> None:
    nowhere = replace(workshop, cache=Path("/proc/nowhere"))  # a training would fail to write
    empty = replace(nowhere, data=replace(workshop.data, validation=first(digits_of(workshop), 0)))
    with pytest.raises(UserError, match="has no validation images and a detector sets its"):
        Defense(wrap={name: DETECTORS[name]}).fit(empty)
    with pytest.raises(UserError, match="not trained yet"):
        DETECTORS[name](workshop.network.model)
    with pytest.raises(UserError, match=r"does not serve threat\.norm=l0"):
        replace(DETECTORS[name], threat=ThreatModel(norm="l0", epsilon=1))
    far = replace(DETECTORS[name], attack=PGD(target=12))
    with pytest.raises(UserError, match=r"attack\.target=12 is out of range"):
        far.fit(nowhere)


def digits_of(workshop: Workshop) -> Split:
    return workshop.data.validation

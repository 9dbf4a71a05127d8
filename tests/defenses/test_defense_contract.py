"""What every defense in conf/defense promises; a new YAML file is found by itself."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_parts import (
    CHOICES,
    CLASSES,
    CONF,
    RECIPES,
    REGULARIZERS,
    WRAPS,
    Network,
    draws,
    global_states,
    gradient_of,
    images,
    outputs_of,
    ready,
    settings,
    transforms_of,
    victim_of,
    workshop,
)
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robustbench_local.building import build_defense
from robustbench_local.defenses import Defense, Preprocess, check_defense, declared_samples
from robustbench_local.errors import UserError
from robustbench_local.gradients import input_gradient
from robustbench_local.randomness import reseed
from robustbench_local.training.step import Step

OUT_OF_RANGE: dict[str, dict[str, list[object]]] = {
    "adversarial_training": {"epsilon_ramp": [-0.1, 1.5], "threat.epsilon": [-0.1]},
    "augmentation": {
        "mixing.chains": [0, 1.5],
        "mixing.depth": [0, True],
        "mixing.severity": [0, 11],
        "cutout": [-0.1, 1.1],
        "noise": [-0.1, "nan"],
        "consistency": [-1, "much"],
    },
    "awp": {"gamma": [0, 1, "nan"]},
    "art": {"eot_samples": [0], "name": ["NoSuch", ["A"]], "kwargs": [{"quality": 120}, 5]},
    "art_detector": {
        "batch_size": [0],
        "epochs": [0, 1.5],
        "false_positive_rate": [-0.1, 1, "nan"],
        "hidden": [0],
        "images": [0],
        "learning_rate": [0, -0.1],
        "name": ["NoSuch", "SubsetScanningDetector", "BeyondDetectorPyTorch", ["A"]],
        "width": [0],
    },
    "bilateral": {"size": [1, 4, 2.5], "sigma_space": [0, -1], "sigma_color": [0, "-1/255"]},
    "bit_depth": {"bits": [0, 9, 1.5, True]},
    "denoiser": {
        "adversarial_share": [-0.1, 1.5],
        "batch_size": [0],
        "depth": [0, 1, 2.5],
        "epochs": [0, "many"],
        "feature_weight": [-1],
        "learning_rate": [0, -1, "fast"],
        "min_steps": [-1],
        "noise": [-0.1],
        "pixel_weight": [-1],
        "width": [0, 1.5],
    },
    "distillation": {"temperature": [0.5, 2000]},
    "fast_adversarial_training": {
        "start": ["zero", ["uniform"]],
        "step_size": [0, -1],
        "noise": [-1],
        "epsilon_ramp": [1.5],
    },
    "free": {"replays": [0, 2.5], "step_size": [0], "epsilon_ramp": [-0.1]},
    "detector": {
        "epochs": [0, 1.5],
        "false_positive_rate": [-0.1, 1, "nan"],
        "width": [0, True],
    },
    "feature_squeezing": {"bits": [0, 9], "size": [0, 1, 4]},
    "feature_squeezing_detector": {
        "false_positive_rate": [-0.1, 1, "nan"],
        "squeezers": [{}, None, 3],
        "squeezers.bit_depth.bits": [0],
    },
    "feature_squeezing_detector_cifar10": {
        "false_positive_rate": [-0.1, 1],
        "squeezers": [{}],
        "squeezers.nlm.strength": [0],
    },
    "gaussian": {"sigma": [0, -1, "nan"]},
    "jpeg": {"quality": [0, 101, 7.5], "surrogate": ["none"]},
    "jpeg_random": {"qualities": [[], [0], [20, 101], 50], "eot_samples": [0, 1.5]},
    "jpeg_slq": {"qualities": [[], [0], [20, 101], 50], "eot_samples": [0, 1.5]},
    "jpeg_vaccinated": {"qualities": [[], [0], [20, 101], 50], "eot_samples": [0, 1.5]},
    "jpeg_vote": {"qualities": [[], [0], [20, 101], 50]},
    "mart": {"weight": [-1, "inf"], "epsilon_ramp": [2], "attack.steps": [0]},
    "median": {"size": [0, 1, 4, 7, 3.0]},
    "nlm": {"search": [1, 4], "patch": [0, 2], "strength": [0, "-2/255"]},
    "noise_fusion": {
        "amplitude": [0, -0.1],
        "distribution": ["cauchy"],
        "draws": [0, 1.5],
        "eot_samples": [0],
    },
    "quantize": {"levels": [1, 0, 2.5, [0.5], [0, 2], [1, 0]]},
    "randomized_smoothing": {
        "alpha": [0, 0.5, 1],
        "draws": [0],
        "eot_samples": [0],
        "images": [0],
        "n": [0],
        "n0": [0],
        "radii": [[], [-1]],
        "sigma": [0, -1],
    },
    "resize_pad": {"output": [0, -1], "smallest": [0, 1.1], "eot_samples": [0, 1.5]},
    "rse": {"init": [-0.1], "inner": [-0.1], "ensembles": [0], "eot_samples": [0]},
    "sap": {"samples": [0, -1], "eot_samples": [0, 1.5]},
    "temperature": {"temperature": [0, -1]},
    "trades": {
        "beta": [0, -1, "inf"],
        "attack.steps": [0],
        "attack.step_size": [0],
        "epsilon_ramp": [2],
    },
    "tv": {"weight": [0, -0.1], "steps": [0, 2.5]},
}
"""By file: a part's keys and values that each must be refused. A new file needs an entry here."""

WITHOUT_TRANSFORMS = {
    "art_detector", "detector", "randomized_smoothing", "rse", "sap", "temperature",
}  # fmt: skip
"""Wraps that transform no pixels by a `Preprocess` of their own."""

wraps = pytest.mark.parametrize("choice", WRAPS)
transforming = pytest.mark.parametrize(
    "choice", [name for name in WRAPS if name not in WITHOUT_TRANSFORMS]
)
channels = pytest.mark.parametrize("channels", [1, 3])
sizes = pytest.mark.parametrize("size", [(28, 28), (33, 30)], ids=["28x28", "33x30"])


def test_the_folder_is_found() -> None:
    assert {"none", "adversarial_training", "median", "resize_pad"} <= set(CHOICES)
    assert sorted({*RECIPES, *REGULARIZERS, *WRAPS, "none"}) == CHOICES


@pytest.mark.parametrize("choice", CHOICES)
def test_a_file_brings_one_part_under_its_own_name(choice: str) -> None:
    assert build_defense(settings(choice)).name == choice


@wraps
@channels
@sizes
def test_the_victim_answers_and_leaves_no_trace(
    choice: str, channels: int, size: tuple[int, int]
) -> None:
    victim = victim_of(ready(choice, channels), channels)
    x = images(channels, *size)
    before, states = x.clone(), global_states()

    logits = victim(x)
    gradient = gradient_of(victim, x, torch.rand(4, outputs_of(victim), generator=seeded()))

    assert (logits.shape, logits.dtype) == ((4, outputs_of(victim)), torch.float32)
    assert logits.isfinite().all() and gradient.isfinite().all()
    assert gradient.flatten(1).abs().amax(1).min() > 0  # for every image
    assert torch.equal(x, before)
    assert global_states() == states
    assert torch.is_grad_enabled()


def transforms_in(choice: str, channels: int) -> list[Preprocess]:
    """The transforms of a file, one at least."""
    found = transforms_of(victim_of(ready(choice, channels), channels))
    assert found, f"{choice} has no transform: add it to WITHOUT_TRANSFORMS"
    return found


@pytest.mark.parametrize("choice", sorted(WITHOUT_TRANSFORMS))
def test_what_is_said_to_have_no_transforms_has_none(choice: str) -> None:
    assert not transforms_of(victim_of(ready(choice, 1), 1))


@transforming
@channels
@sizes
def test_transforms_return_images(choice: str, channels: int, size: tuple[int, int]) -> None:
    """In [0, 1], as many, of as many channels and of the same type, also from flat ones."""
    for part in transforms_in(choice, channels):
        for x in (images(channels, *size), torch.zeros(2, channels, *size),
                  torch.ones(2, channels, *size)):  # fmt: skip
            # What has weights takes pixels of their type, as networks do.
            for given in (x,) if any(True for _ in part.parameters()) else (x, x.double()):
                with torch.no_grad():
                    out = part.transform(given)
                assert out.shape[:2] == x.shape[:2] and out.dim() == 4
                assert (out.dtype, out.device) == (given.dtype, given.device)
                assert float(out.min()) >= 0 and float(out.max()) <= 1


@transforming
@channels
def test_forward_is_the_transform_and_backward_its_surrogate(choice: str, channels: int) -> None:
    x = images(channels, 33, 30)
    for part in transforms_in(choice, channels):
        part.reseed(5)
        with torch.no_grad():
            exact = part.transform(x)
        part.reseed(5)
        assert torch.equal(part(x), exact)
        part.reseed(5)
        assert torch.equal(part(x.clone().requires_grad_()).detach(), exact)

        if part.differentiable:
            continue  # its gradient has a test of its own
        weight = torch.rand(exact.shape, generator=seeded())
        part.reseed(5)
        gradient = gradient_of(part, x, weight)
        part.reseed(5)
        with torch.no_grad():
            part.transform(x)  # a surrogate may stand in for this very draw
        assert torch.equal(gradient, gradient_of(part.surrogate, x, weight))


@transforming
@channels
def test_what_is_differentiable_has_the_gradient_of_finite_differences(
    choice: str, channels: int
) -> None:
    """Along one direction, in float64, at pixels that differ and lie off the ends of the box."""
    x = 0.2 + 0.6 * torch.rand(2, channels, 17, 14, generator=seeded(), dtype=torch.float64)
    along, step = torch.randn(x.shape, generator=seeded(1), dtype=torch.float64), 1e-7
    for part in transforms_in(choice, channels):
        if not part.differentiable:
            continue  # another function stands in for it
        part = copy.deepcopy(part).double()
        for weights in part.parameters():  # untrained ones may make it the identity
            weights.data += 0.1 * torch.randn(weights.shape, generator=seeded(2))

        def at(images: Tensor, part: Preprocess = part) -> Tensor:
            part.reseed(5)
            return part(images)

        weight = torch.randn(at(x).shape, generator=seeded(3), dtype=torch.float64)
        with torch.no_grad():
            slope = ((at(x + step * along) - at(x - step * along)) * weight).sum() / (2 * step)
        found = (gradient_of(at, x, weight) * along).sum()
        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-4)
        assert float(slope.abs()) > 1e-3


@wraps
@channels
def test_autograd_and_train_mode_change_nothing(choice: str, channels: int) -> None:
    victim, x = victim_of(ready(choice, channels), channels), images(channels, 28, 28)
    answers = []
    for training in (False, True):
        for tracked in (False, True):
            reseed(victim.train(training), 3)
            answers.append(victim(x.clone().requires_grad_(tracked)).detach())
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-6, atol=1e-6)


@wraps
def test_the_victims_own_seed_decides_its_draws(choice: str) -> None:
    defense, x = ready(choice, 1), images(1, 28, 28, count=8)
    victim, other = victim_of(defense, 1), victim_of(defense, 1)

    def answers(asked: nn.Module, seed: int) -> Tensor:
        reseed(asked, seed)
        return torch.stack([asked(x).detach(), asked(x).detach()])

    first = answers(victim, 1)
    for seeding in (torch.manual_seed, np.random.seed, random.seed):
        state = torch.get_rng_state(), np.random.get_state(), random.getstate()
        seeding(7)
        assert torch.equal(answers(victim, 1), first)
        torch.set_rng_state(state[0]), np.random.set_state(state[1]), random.setstate(state[2])
    # One victim's draws move no other's.
    reseed(other, 1)
    reseed(victim, 1)
    taken = [asked(x).detach() for asked in (victim, other, victim, other)]
    assert torch.equal(torch.stack(taken[::2]), first)
    assert torch.equal(torch.stack(taken[1::2]), first)
    if draws(victim):
        assert not torch.equal(answers(victim, 2), first)
        assert not torch.equal(first[0], first[1])
        assert declared_samples(victim) >= 2
    else:
        assert torch.equal(answers(victim, 2), first)
        assert torch.equal(first[0], first[1])


@wraps
@channels
def test_weights_are_saved_and_loaded(choice: str, channels: int, tmp_path: Path) -> None:
    victim, x = victim_of(ready(choice, channels), channels), images(channels, 28, 28)
    torch.save(victim.state_dict(), tmp_path / "weights.pt")
    twin, empty = copy.deepcopy(victim), copy.deepcopy(victim)
    with torch.no_grad():
        for weight in empty.parameters():
            weight.fill_(0.1)
    answers = []
    for asked in (victim, twin, empty):
        reseed(asked, 4)
        answers.append(asked(x).detach())
    assert torch.equal(answers[1], answers[0])
    assert not torch.equal(answers[2], answers[0])
    empty.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    reseed(empty, 4)
    assert torch.equal(empty(x).detach(), answers[0])


@wraps
@channels
def test_an_image_does_not_depend_on_its_batch(choice: str, channels: int) -> None:
    """Nor on how the batch lies in memory."""
    victim, x = victim_of(ready(choice, channels), channels), images(channels, 33, 30)
    views = [x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 0)[::2]]
    reseed(victim, 6)
    whole = victim(x)
    for view in views:
        reseed(victim, 6)
        torch.testing.assert_close(victim(view), whole, rtol=0, atol=1e-5)
    if not draws(victim):
        alone = torch.cat([victim(image[None]) for image in x])
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


@pytest.mark.slow
@wraps
def test_the_gradient_leads_uphill(
    choice: str, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """A step along its sign raises the loss more than any of some random signs does."""
    x, y = (part[:40] for part in digit_images)
    victim = ready(choice, 1).apply(digit_model)
    samples = 8 if draws(victim) else 1

    def loss(images: Tensor) -> float:
        reseed(victim, 9)
        with torch.no_grad():
            logits = [victim(images.clamp(0, 1)) for _ in range(samples)]
        return float(torch.stack([cross_entropy(each, y) for each in logits]).mean())

    gradient = input_gradient(victim, x, y, eot_samples=samples).gradient
    random_signs = [torch.randn(x.shape, generator=seeded(n)).sign() for n in range(3)]
    uphill = loss(x + 0.15 * gradient.sign())
    assert uphill > loss(x) + 0.2
    assert uphill > 2 * max(loss(x + 0.15 * sign) for sign in random_signs)


@wraps
@channels
def test_it_passes_its_trial_with_a_network_that_takes_any_size(choice: str, channels: int) -> None:
    check_defense(build_defense(settings(choice)), Network(channels), workshop(channels).data)


@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "none"])
def test_values_out_of_range_are_refused(choice: str) -> None:
    """Every number of a part has values that are refused with its key, as it is typed.

    So are words in the place of true and false, and values in the place of what has a _target_.
    """
    assert choice in OUT_OF_RANGE, f"add {choice} to OUT_OF_RANGE"
    node = settings(choice)
    (half,) = (half for half in ("recipe", "regularize", "wrap") if choice in node[half])
    own = node[half][choice]
    numbers = {key for key in own if type(own[key]) in (int, float)}
    assert numbers <= set(OUT_OF_RANGE[choice]), "a number without a value that is refused"
    flags = {key: ["no", "off", 1, None] for key in own if type(own[key]) is bool}
    parts = {
        key: ["pgd", 0.3]
        for key in own
        if isinstance(own[key], DictConfig) and "_target_" in own[key]
    }
    for key, values in {**OUT_OF_RANGE[choice], **flags, **parts}.items():
        for value in values:
            said = refusal(node, f"{half}.{choice}.{key}", value)
            assert f"defense.{half}.{choice}.{key}" in said
            assert any(word in said for word in ("expected", "type", "check"))


def refusal(node: DictConfig, key: str, value: object) -> str:
    """What is said where the key of the group has that value."""
    wrong = copy.deepcopy(node)
    OmegaConf.update(wrong, key, value, merge=False)
    with pytest.raises(UserError) as caught:
        build_defense(wrong)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("choice", RECIPES)
def test_a_recipe_without_its_attack_is_refused(choice: str) -> None:
    own = settings(choice).recipe[choice]
    for key in {"attack", "validation", "threat"} & set(own):
        said = refusal(settings(choice), f"recipe.{choice}.{key}", None)
        assert said.startswith(f"defense.recipe.{choice}.{key}=null; expected a")


def test_a_part_under_another_name_and_within_another_says_where_it_lies() -> None:
    node = copy.deepcopy(settings("median"))
    OmegaConf.update(node, "wrap", {"mine": {**node.wrap.median, "size": 4}}, merge=False)
    with pytest.raises(
        UserError, match=r"^defense\.wrap\.mine\.size=4; .* type defense\.wrap\.mine"
    ):
        build_defense(node)
    # What follows another setting is mended there.
    told = r"^train\.adversarial_steps=0; expected"
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises(UserError, match=told),
    ):
        build_defense(compose("config", ["defense=mart", "train.adversarial_steps=0"]).defense)


@pytest.mark.parametrize(
    ("choice", "key", "told"),
    [
        ("jpeg", "wrap.jpeg.foo", r"defense\.wrap\.jpeg\.foo is not a key of Jpeg; expected one of "
         r"quality, surrogate, in_training, at_run_time: type defense\.wrap\.jpeg\.KEY=VALUE"),
        ("mart", "recipe.mart.attack.foo", r"defense\.recipe\.mart\.attack\.foo is not a key of P"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_told_with_those_beside_it(choice: str, key: str, told: str) -> None:
    node = copy.deepcopy(settings(choice))
    OmegaConf.update(node, key, 1, force_add=True)
    with pytest.raises(UserError, match=f"^{told}"):
        build_defense(node)


@pytest.mark.parametrize("choice", [*RECIPES, *REGULARIZERS])
def test_a_recipe_trains_from_its_seed_alone(choice: str) -> None:
    recipe = build_defense(settings(choice)).training_recipe.prepare(workshop(1))
    x, y = images(1, 28, 28, count=8), torch.arange(8) % CLASSES

    def step(seed: int) -> tuple[Tensor, Tensor]:
        network = Network(1).train()
        loss, logits = recipe.begin().loss(  # an epoch anew
            network, Step(x, y, criterion=cross_entropy, progress=0.9, number=3, seed=seed)
        )
        assert logits.shape == (8, CLASSES)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])

    before, states = x.clone(), global_states()
    loss, gradient = step(seed=1)
    assert loss.shape == () and loss.isfinite() and gradient.isfinite().all()
    assert float(gradient.abs().max()) > 0
    assert torch.equal(x, before)
    assert global_states() == states
    torch.manual_seed(8)
    again = step(seed=1)
    assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)


def test_two_recipes_at_once_are_refused_with_both_names() -> None:
    pairs = [(one, two) for one in RECIPES for two in RECIPES if one < two]
    for one, two in pairs or [("adversarial_training", "other")]:
        first = build_defense(settings(one)).recipe
        second = build_defense(settings(two)).recipe if pairs else {two: first[one]}
        with pytest.raises(UserError, match=rf"2 recipes \({one}, {two}\).*type defense={one}"):
            Defense(recipe={**first, **second})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

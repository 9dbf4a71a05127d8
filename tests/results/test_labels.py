"""Two choices that differ never get one name."""

import pytest
from hydra import compose, initialize_config_dir

from robustbench_local.__main__ import CONF
from robustbench_local.results.labels import choice_label


@pytest.mark.parametrize(
    ("group", "choice", "overrides", "expected"),
    [
        ("attack", "pgd", [], "pgd"),
        ("attack", "pgd", ["seed=3"], "pgd"),
        ("attack", "pgd", ["attack.steps=100", "attack.restarts=5"], "pgd-restarts5-steps100"),
        ("attack", "fgsm", ["attack=fgsm", "attack.loss=dlr"], "fgsm-lossdlr"),
        ("attack", "one_pixel", ["attack=one_pixel"], "one_pixel"),
        (
            "attack",
            "few_pixel",
            ["attack=few_pixel", "attack.population=9"],
            "few_pixel-population9",
        ),
        ("train", "mnist", ["train.epochs=1"], "mnist-epochs1"),
        ("model", "custom", ["model=custom", "model._target_=a.b.Net"], "custom-Net"),
        (
            "model",
            "custom",
            ["model=custom", "model._target_=a.Net", "+model.k=2"],
            "custom-Net-k2",
        ),
        ("attack", "unknown_file", [], "unknown_file"),
        # What the file takes from elsewhere counts where it was overridden, and only there.
        ("defense", "adversarial_training", ["train.adversarial_steps=9"], "adversarial_training"),
        (
            "defense",
            "adversarial_training",
            ["defense.recipe.adversarial_training.attack.steps=9"],
            "adversarial_training-attack.steps9",
        ),
        (
            "defense",
            "adversarial_training",
            ["defense.recipe.adversarial_training.validation.steps=9"],
            "adversarial_training-validation.steps9",
        ),
        ("attack", "pgd", ["attack.seed=1"], "pgd-seed1"),
        ("attack", "pgd", ["~attack.best_iterate"], "pgd-best_iterate-"),
        # Of a whole library the name says nothing, even where no key was changed.
        ("attack", "torchattacks", ["attack=torchattacks"], "torchattacks-MIFGSM"),
        ("attack", "hop_skip_jump", ["attack=hop_skip_jump"], "hop_skip_jump"),
        ("defense", "art", [], "art-JpegCompression"),
        (
            "defense",
            "art",
            ["defense.wrap.art.name=SpatialSmoothing", "++defense.wrap.art.kwargs.window_size=3"],
            "art-SpatialSmoothing-kwargs.window_size3",
        ),
        ("defense", "art_detector", [], "art_detector-BinaryInputDetector"),
    ],
)
def test_label(group, choice, overrides, expected):
    if group == "defense":
        overrides = [f"defense=[{choice},none]", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides)
    assert choice_label(config, group, choice, [CONF]) == expected

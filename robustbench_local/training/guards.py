"""What tells a training that failed although its numbers look fine."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from robustbench_local.training.validation import robust_accuracy
from robustbench_local.types import Model

if TYPE_CHECKING:
    from robustbench_local.data import Dataset
    from robustbench_local.defenses.recipe import Recipe
    from robustbench_local.training.course import Course

DROP = 0.2
"""A collapse: robust validation accuracy falls by more than this below an earlier epoch."""

GAP = 0.3
"""Training accuracy above robust accuracy by more than this: the training attack misses much."""

STRONGER = (
    "train with a stronger attack: defense=adversarial_training, with more train.adversarial_steps"
)


def find_warnings(
    model: Model, data: "Dataset", recipe: "Recipe", course: "Course"
) -> tuple[str, ...]:
    """Sentences about a finished training, each after a short id and a colon.

    `model` has the weights of the last epoch, which need not be the one selected.
    """
    history, best = course.history, course.selected
    found = [_at_chance(data, history[best - 1])]
    attack = recipe.validation_attack()
    if attack is not None:
        found.append(_collapse(history, best))
        last = history[-1]
        if not last["settled"]:
            found.append(
                "unsettled: the training ended before epsilon had its full size, so its collapse "
                "could not be looked for; raise train.epochs or lower epsilon_ramp"
            )
        gap = last["train_accuracy"] - last["robust_validation_accuracy"]
        if last["settled"] and gap > GAP:
            # The same images the training accuracy is counted on, so that memorising them is not
            # taken for masking.
            known = robust_accuracy(model, data.train, *attack)
            found.append(_gap(last, known))
    return tuple(sentence for sentence in found if sentence)


def _at_chance(data: "Dataset", entry: Mapping[str, Any]) -> str:
    labels = data.validation.labels
    chance = int(torch.bincount(labels).max()) / len(labels)
    accuracy = entry["validation_accuracy"]
    margin = 2 * (chance * (1 - chance) / len(labels)) ** 0.5
    if accuracy > chance + margin:
        return ""
    return (
        f"validation_at_chance: validation accuracy is {accuracy:.1%} on {len(labels):,} images "
        f"and naming the most frequent class alone gives {chance:.1%}; the network has learnt "
        "nothing, lower train.learning_rate or raise train.epochs"
    )


def _collapse(history: Sequence[Mapping[str, Any]], best: int) -> str:
    """The largest fall below an earlier epoch (arXiv:2001.03994, section 5)."""
    key = "robust_validation_accuracy"
    falls = [(a[key] - b[key], a, b) for a, b in combinations(history, 2)]
    if not falls:
        return ""
    drop, before, after = max(falls, key=lambda fall: fall[0])
    if drop <= DROP:
        return ""
    return (
        f"catastrophic_overfitting: robust validation accuracy fell from {before[key]:.1%} to "
        f"{after[key]:.1%} in epoch {after['epoch']}; epoch {best} was selected, {STRONGER}"
    )


def _gap(last: Mapping[str, Any], known: float) -> str:
    """Training accuracy far above robust accuracy: a weak attack, or memorised images."""
    trained, robust = last["train_accuracy"], last["robust_validation_accuracy"]
    if trained - known >= known - robust:  # most of the gap is there on the same images
        return (
            f"catastrophic_overfitting: the network ends with {trained:.1%} on the examples it was "
            f"trained on and {known:.1%} under the validation attack on the same images; the "
            f"training attack is too weak and gradients are masked, {STRONGER}"
        )
    return (
        f"robust_overfitting: the network ends with {known:.1%} under the validation attack on "
        f"training images and {robust:.1%} on held-out ones; it has memorised them, add data, "
        "train.augmentation or train.weight_decay"
    )

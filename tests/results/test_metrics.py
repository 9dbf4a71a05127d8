"""Metrics beyond accuracy, against counts by hand and ranks by brute force."""

import json
from itertools import product

import numpy as np
import pytest

from robustbench_local.evaluation import PerExample
from robustbench_local.results.metrics import measure

LABELS = np.array([0, 0, 0, 1, 1, 2])
CLEAN = np.array([0, 0, 1, 1, 1, 0])  # recall 2/3, 1, 0; precision 2/3, 2/3, 0 (never predicted)
ATTACKED = np.array([1, 0, 1, 1, 0, 0])


def probabilities(predicted, classes, *, seed=0):
    drawn = np.random.default_rng(seed).random((len(predicted), classes))
    drawn[np.arange(len(predicted)), predicted] += 1
    return (drawn / drawn.sum(1, keepdims=True)).astype(np.float16)


def examples(classes=3):
    n = len(LABELS)
    clean = (CLEAN == LABELS).astype(float)
    return PerExample(
        indices=np.arange(n),
        labels=LABELS,
        clean_correct=clean,
        robust_correct=clean * (ATTACKED == LABELS),
        clean_prediction=CLEAN,
        adversarial_prediction=ATTACKED,
        attacked=clean > 0,
        size=np.zeros(n),
        target=np.full(n, -1),
        clean_probabilities=probabilities(CLEAN, classes),
        adversarial_probabilities=probabilities(ATTACKED, classes, seed=1),
    )


def test_counts_by_hand():
    found = measure(examples(), 3)
    assert found["robust_accuracy_per_class"] == [pytest.approx(1 / 3), 0.5, 0.0]
    clean = found["clean"]
    assert clean["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert found["attacked"]["confusion"] == [[1, 2, 0], [1, 1, 0], [1, 0, 0]]
    assert clean["recall"] == pytest.approx([2 / 3, 1, 0])
    assert clean["precision"] == pytest.approx([2 / 3, 2 / 3, 0])
    assert clean["f1"] == pytest.approx([2 / 3, 4 / 5, 0])
    assert clean["macro"]["recall"] == pytest.approx(5 / 9)
    assert json.loads(json.dumps(found)) == found


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    said = examples().clean_probabilities.astype(float)
    areas = []
    for label in range(3):
        positive, negative = said[label == LABELS, label], said[label != LABELS, label]
        order = [(a > b) + 0.5 * (a == b) for a, b in product(positive, negative)]
        areas.append(np.mean(order))
    assert measure(examples(), 3)["clean"]["macro"]["roc_auc"] == pytest.approx(np.mean(areas))


def test_confidence_where_right_and_where_wrong():
    said = examples().clean_probabilities.astype(float)[np.arange(6), CLEAN]
    clean = measure(examples(), 3)["clean"]["confidence"]
    assert clean["right"] == pytest.approx(said[CLEAN == LABELS].mean())
    assert clean["wrong"] == pytest.approx(said[CLEAN != LABELS].mean())


def test_a_class_that_does_not_occur_is_left_out_of_the_means():
    with_it, without = measure(examples(4), 4), measure(examples(), 3)
    assert with_it["robust_accuracy_per_class"][3] is None
    assert with_it["clean"]["macro"]["f1"] == without["clean"]["macro"]["f1"]
    assert len(with_it["clean"]["confusion"]) == 4

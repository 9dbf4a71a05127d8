"""How a classifier errs, beyond accuracy: per class, which class for which, and how confidently."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustbench_local.evaluation.evaluate import PerExample


def measure(examples: PerExample, classes: int) -> dict[str, Any]:
    """Metrics of the clean images and of the attacked ones, as JSON holds them.

    Each of `clean` and `attacked` has

    - `confusion`: (K, K) counts, a row for each true class, a column for each predicted one, and a
      last one for rejection where the victim may reject an image,
    - `precision`, `recall`, `f1`: a number for each class; 0 where a class is never predicted or
      does not occur,
    - `macro`: their means over the classes that occur, and `roc_auc` (one class against the rest,
      mean over the classes; null where only one class occurs),
    - `confidence`: the mean probability of the predicted class, where that is right and where it is
      wrong (null where there is none); of accepted images only.

    `robust_accuracy_per_class` counts as everywhere: the mean of `robust_correct` over all images
    of the class; null for a class without images. Predictions are those of the judge's first
    draw, probabilities the mean over its draws; images wrong from the start count as they were.
    """
    rejects = examples.clean_rejected.size > 0
    share = [examples.robust_correct[examples.labels == label] for label in range(classes)]
    return {
        "robust_accuracy_per_class": [float(of.mean()) if len(of) else None for of in share],
        "clean": _look(
            examples.labels,
            examples.clean_prediction,
            examples.clean_probabilities,
            classes,
            rejects=rejects,
        ),
        "attacked": _look(
            examples.labels,
            examples.adversarial_prediction,
            examples.adversarial_probabilities,
            classes,
            rejects=rejects,
        ),
    }


def _look(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    probabilities: NDArray[np.float16],
    classes: int,
    *,
    rejects: bool,
) -> Mapping[str, Any]:
    # Imported where used: a run of which the record is known needs none of it.
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = np.arange(classes)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=every, zero_division=0
    )
    occurs = support > 0
    accepted = predicted < classes
    confidence = probabilities.astype(np.float64)[
        np.arange(len(labels)), np.where(accepted, predicted, 0)
    ]
    right = predicted == labels
    wrong = accepted & ~right
    answers = np.arange(classes + rejects)
    return {
        "confusion": confusion_matrix(labels, predicted, labels=answers)[:classes].tolist(),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
        "macro": {
            "precision": float(precision[occurs].mean()),
            "recall": float(recall[occurs].mean()),
            "f1": float(f1[occurs].mean()),
            "roc_auc": _roc_auc(labels, probabilities, every[occurs]),
        },
        "confidence": {
            "right": float(confidence[right].mean()) if right.any() else None,
            "wrong": float(confidence[wrong].mean()) if wrong.any() else None,
        },
    }


def measure_detection(examples: PerExample) -> dict[str, Any] | None:
    """How well rejection tells attacked images from clean ones; None where nothing can be rejected.

    - `clean_rejected`: the share of all test images that is rejected without any attack, the
      false-positive rate on the test set,
    - `attacked` images, and the share of them that is rejected, `attacked_rejected`,
    - `fooling`: how many of them the network behind the detector gets wrong, rejected or not; the
      share of these that is rejected, `fooling_rejected`,
    - `attacked_roc_auc` and `fooling_roc_auc`: the probability that an attacked image, or one of
      those that fool the network, has a higher detection score than a clean one; equal scores
      count half.

    Null where there is no such image. Of a random victim shares and scores are means over the
    judge's draws.
    """
    if not examples.clean_rejected.size:
        return None
    attacked = examples.attacked
    fooling = attacked & (examples.adversarial_class != examples.labels)

    def rejected(which: NDArray[np.bool_]) -> float | None:
        return float(examples.adversarial_rejected[which].mean()) if which.any() else None

    def area(which: NDArray[np.bool_]) -> float | None:
        from sklearn.metrics import roc_auc_score

        if not which.any():
            return None
        scores = np.concatenate((examples.clean_suspicion, examples.adversarial_suspicion[which]))
        positive = np.arange(len(scores)) >= len(examples.clean_suspicion)
        return float(roc_auc_score(positive, scores))

    return {
        "clean_rejected": float(examples.clean_rejected.mean()),
        "attacked": int(attacked.sum()),
        "attacked_rejected": rejected(attacked),
        "fooling": int(fooling.sum()),
        "fooling_rejected": rejected(fooling),
        "attacked_roc_auc": area(attacked),
        "fooling_roc_auc": area(fooling),
    }


def _roc_auc(
    labels: NDArray[np.int64], probabilities: NDArray[np.float16], occurring: NDArray[np.int64]
) -> float | None:
    from sklearn.metrics import roc_auc_score

    if len(occurring) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an undefined area would come back as NaN
        areas = [roc_auc_score(labels == label, probabilities[:, label]) for label in occurring]
    return float(np.mean(areas))

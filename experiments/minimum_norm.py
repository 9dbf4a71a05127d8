"""Median distances of our minimum-norm attacks and Foolbox's, on the same network and images.

    python experiments/minimum_norm.py --weights cache/weights/KEY.safetensors --data DIR

Needs the extra `[test]`. The network is `small_cnn` for MNIST.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foolbox
import numpy as np
import torch
from torch import Tensor, nn

from robustbench_local.attacks import CW, DDN, FMN
from robustbench_local.attacks.minimum_norm import MinimumNorm
from robustbench_local.data import MNIST, load
from robustbench_local.models import build_model, load_checkpoint
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

# Equal steps on both sides; CW as Foolbox has it by default, which are the paper's values.
PAIRS: dict[str, tuple[Norm, MinimumNorm, Callable[[], Any]]] = {
    "fmn linf": ("linf", FMN(steps=100), lambda: foolbox.attacks.LInfFMNAttack(steps=100)),
    "fmn l2": ("l2", FMN(steps=100), lambda: foolbox.attacks.L2FMNAttack(steps=100)),
    "fmn l1": ("l1", FMN(steps=100), lambda: foolbox.attacks.L1FMNAttack(steps=100)),
    "ddn l2": ("l2", DDN(steps=100), lambda: foolbox.attacks.DDNAttack(steps=100)),
    "cw l2": (
        "l2",
        CW(steps=1000, binary_search_steps=9),
        lambda: foolbox.attacks.L2CarliniWagnerAttack(steps=1000, binary_search_steps=9),
    ),
}


def distances(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, norm: Norm) -> np.ndarray:
    """Under the norm, float64 (N,); infinite where the network is still right."""
    with torch.no_grad():
        fooled = model(x_adv).argmax(1) != y
    size = ThreatModel(norm=norm, epsilon=1).size(x_adv, x)
    return torch.where(fooled, size, torch.inf).numpy()


def main() -> None:
    """Print one JSON line for each attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--images", type=int, default=1000, help="the first ones, rightly classified"
    )
    parser.add_argument("--attacks", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the raw figures")
    options = parser.parse_args()

    data = load(MNIST(), options.data, Path("cache"), "cpu")
    settings = {"_target_": "robustbench_local.models.SmallCNN", "mean": None, "std": None}
    model = build_model(settings, data)
    load_checkpoint(model, options.weights)
    model.eval().requires_grad_(False)
    x, y = data.test.pixels(slice(0, 2 * options.images)), data.test.labels[: 2 * options.images]
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right][: options.images], y[right][: options.images]

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(y)
    lines = []
    for name in options.attacks:
        norm, ours, theirs = PAIRS[name]
        began = time.perf_counter()
        mine = ours.nearest(model, x, y, ThreatModel(norm=norm, epsilon=1))
        middle = time.perf_counter()
        torch.manual_seed(0)
        other = theirs().run(wrapped, x, criterion)
        ended = time.perf_counter()
        known = [distances(model, found, x, y, norm) for found in (mine, other)]
        medians = [float(np.median(found)) for found in known]
        failures = [int(np.isinf(found).sum()) for found in known]
        line = {
            "attack": name, "n": len(x), "median_ours": medians[0], "median_foolbox": medians[1],
            "ratio": medians[0] / medians[1], "not_found_ours": failures[0],
            "not_found_foolbox": failures[1], "seconds_ours": middle - began,
            "seconds_foolbox": ended - middle,
        }  # fmt: skip
        lines.append(line)
        print(json.dumps(line), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(lines, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

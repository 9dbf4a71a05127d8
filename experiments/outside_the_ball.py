"""How far JPEG carries images out of the ball that a network was adversarially trained for.

    python experiments/outside_the_ball.py --weights cache/weights/KEY.safetensors --data DIR

The network is that of `+experiment=defenses` on MNIST, its key is `weights` in the record.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from robustbench_local.attacks import PGD
from robustbench_local.data import MNIST, load
from robustbench_local.defenses import Jpeg
from robustbench_local.models import build_model, load_checkpoint
from robustbench_local.threat import ThreatModel

BATCH = 250


def by_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Images or logits of all images, a batch at a time."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(BATCH)])


def main() -> None:
    """Print a line for PGD-40 on the network alone, and one for PGD-40 on both together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--epsilon", type=float, default=0.3)
    options = parser.parse_args()

    data = load(MNIST(test_size=1000), options.data, Path("cache"), "cpu")
    settings = {
        "_target_": "robustbench_local.models.SmallCNN",
        "width": 16, "hidden": 64, "mean": None, "std": None,
    }  # fmt: skip
    network = build_model(settings, data)
    load_checkpoint(network, options.weights)
    network.eval().requires_grad_(False)
    jpeg = Jpeg(quality=75, surrogate="differentiable")
    x, y = data.test.pixels(slice(None)), data.test.labels
    threat = ThreatModel(norm="linf", epsilon=options.epsilon)

    def accuracy(images: Tensor) -> float:
        return 100 * float((by_batches(network, images).argmax(1) == y).float().mean())

    for name, victim in (
        ("network", network),
        ("network behind jpeg", nn.Sequential(jpeg, network)),
    ):
        attack = PGD(steps=40)
        pairs = zip(x.split(BATCH), y.split(BATCH), strict=True)
        x_adv = torch.cat([attack.run(victim, *pair, threat) for pair in pairs])
        seen = by_batches(jpeg.transform, x_adv)
        distance = (seen - x).abs()
        outside = distance > options.epsilon + 1e-6
        print(
            f"PGD-40 on the {name}: of n = {len(x)} the network has right {accuracy(x_adv):.1f}% "
            f"of the attacked images, {accuracy(seen):.1f}% behind jpeg, where "
            f"{100 * float(outside.float().mean()):.1f}% of the pixels are beyond "
            f"{options.epsilon} and the farthest of an image at "
            f"{float(distance.flatten(1).amax(1).median()):.2f} (median), and "
            f"{accuracy(threat.project(seen, x)):.1f}% of these clipped to the ball"
        )


if __name__ == "__main__":
    main()

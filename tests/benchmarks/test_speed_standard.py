"""The standard cascade beside the original AutoAttack: same network, same images, same budgets."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import accuracy
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from robustbench_local.attacks import Attack
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel

pytestmark = pytest.mark.slow

CONF = Path(__file__).parents[2] / "conf" / "attack"
IMAGES = 160
# Fewer than half of the steps and a tenth of the queries, in both: whole, the two take minutes.
STEPS, QUERIES = 40, 500


def attack(choice: str) -> Attack:
    config = OmegaConf.load(CONF / f"{choice}.yaml")
    assert isinstance(config, DictConfig)
    config.seed = 0
    for node in (config, *config.get("parts", {}).values()):
        if "eot_samples" in node:  # the network draws nothing
            node.eot_samples = 1
        if "steps" in node:
            node.steps = STEPS
        if "queries" in node:
            node.queries = QUERIES
    built: Attack = instantiate(config, _convert_="object")
    return built


@dataclass
class Result:
    """What one attack took, what it left, and what it asked."""

    seconds: float
    robust: float
    forward: float
    backward: float


def run(choice: str, model: nn.Module, x: Tensor, y: Tensor) -> Result:
    threat = ThreatModel(norm="linf", epsilon=0.3)
    oracle, chosen = Oracle(model, threat, 10), attack(choice)
    chosen(model, x[:8], y[:8], threat)  # allocate and import before the clock starts
    began = time.perf_counter()
    x_adv = chosen(oracle, x, y, threat)
    seconds = time.perf_counter() - began
    threat.check(x_adv, x)
    return Result(
        seconds,
        accuracy(model, x_adv, y),
        oracle.forward_passes / len(x),
        oracle.backward_passes / len(x),
    )


def test_standard_beside_autoattack(
    benchmark: BenchmarkFixture, robust_digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = digit_images
    with torch.no_grad():
        rows = (robust_digit_model(x).argmax(1) == y).nonzero().squeeze(1)[:IMAGES]

    def race() -> dict[str, Result]:
        return {
            choice: run(choice, robust_digit_model, x[rows], y[rows])
            for choice in ("autoattack", "standard")
        }

    results = benchmark.pedantic(race, rounds=1)
    for choice, result in results.items():
        benchmark.extra_info.update({f"{choice}_{k}": round(v, 4) for k, v in vars(result).items()})
    ours, theirs = results["standard"], results["autoattack"]
    assert ours.robust <= theirs.robust, results
    assert ours.seconds <= theirs.seconds, results

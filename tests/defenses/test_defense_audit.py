"""Defenses as they ship raise no flag where the attack averages as many draws as they declare."""

from dataclasses import replace

import pytest
import torch
from contract_parts import CLASSES, WRAPS, images, ready, victim_of, workshop

from robustbench_local.attacks import PGD
from robustbench_local.data import Split
from robustbench_local.defenses import declared_samples
from robustbench_local.evaluation import Audit, audit_victim
from robustbench_local.gradients import is_randomized


@pytest.mark.slow
@pytest.mark.parametrize("choice", WRAPS)
def test_a_defense_attacked_as_it_should_be_is_not_flagged(choice: str) -> None:
    victim = victim_of(ready(choice, 1), 1)
    x = images(1, 28, 28, count=16, seed=3)
    with torch.no_grad():
        y = victim(x)[:, :CLASSES].argmax(1)
    split = Split((x * 255).round().to(torch.uint8), y, torch.arange(len(x)))
    data = replace(workshop(1).data, test=split, test_total=len(x))

    def raised(eot_samples: int) -> set[str]:
        attack = PGD(eot_samples=eot_samples)
        checks = audit_victim(victim, data, attack, config=Audit())
        return {check.name for check in checks if check.raised} - {"subset"}

    assert raised(declared_samples(victim)) == set()
    assert raised(1) == ({"randomized"} if is_randomized(victim) else set())

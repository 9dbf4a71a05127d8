"""Every flag is raised where its cause is planted, and only there."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from robustbench_local.data import Dataset, Split
from robustbench_local.evaluation import audit


def dataset(n=1000, source="files"):
    images = torch.randint(0, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    split = Split(images.to(torch.uint8), torch.arange(n) % 3, torch.arange(n))
    return Dataset("toy", source, split, split, split, ("a", "b", "c"), n, "f", "t", ())


class Victim(nn.Module):
    def __init__(self, change=lambda logits, x: logits):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 3)
        self.change = change

    def forward(self, x):
        return self.change(self.linear(x.flatten(1)), x)


PLANTED = {
    "randomized": lambda logits, x: logits + 0.1 * torch.randn_like(logits),
    "softmax_output": lambda logits, x: logits.softmax(1),
    "gradient_switch": lambda logits, x: logits + 1.0 * x.requires_grad * torch.eye(3)[0],
    "zero_gradient": lambda logits, x: logits * 0 + logits.detach(),
}


def names(flags):
    return {flag.name for flag in flags}


def test_a_plain_victim_on_the_full_test_set_has_no_flag():
    assert audit(Victim(), dataset()) == []


@pytest.mark.parametrize("name", PLANTED)
def test_planted_cause(name):
    flags = audit(Victim(PLANTED[name]), dataset())
    assert names(flags) == {name}
    assert flags[0].severe == (name != "softmax_output")
    assert flags[0].why


def test_randomised_victims_are_fine_under_eot():
    assert names(audit(Victim(PLANTED["randomized"]), dataset(), eot_samples=20)) == set()


def test_log_probabilities_are_not_probabilities():
    assert audit(Victim(lambda logits, x: logits.log_softmax(1)), dataset()) == []


@pytest.mark.parametrize(
    "data", [dataset(999), dataset(source="embedded"), replace(dataset(), test_total=2000)]
)
def test_subset(data):
    flags = audit(Victim(), data)
    assert names(flags) == {"subset"}
    assert not flags[0].severe

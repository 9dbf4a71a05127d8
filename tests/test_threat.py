import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from robustbench_local.errors import UserError
from robustbench_local.randomness import Draws
from robustbench_local.threat import BudgetError, ThreatModel, parse_epsilon
from robustbench_local.types import Norm

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")
norms = pytest.mark.parametrize("norm", NORMS)


def images(count: int = 6, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return (3 * torch.rand(count, *shape, generator=generator) - 1).clamp_(0, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        (" 0.3 ", 0.3),
        ("8 / 255", 8 / 255),
        (8, 8.0),
        (0, 0.0),
        (0.3, 0.3),
        ("1e-2", 0.01),
        ("-1/2", -0.5),
    ],
)
def test_epsilon_is_read(text: object, value: float) -> None:
    assert parse_epsilon(text) == value
    assert isinstance(parse_epsilon(text), float)


@pytest.mark.parametrize(
    "text",
    ["abc", "1/0", "nan", "inf", "-inf", "", " ", None, [], float("nan"), float("inf"), "8/255/2"],
)
def test_what_is_no_radius_is_refused(text: object) -> None:
    with pytest.raises(UserError) as caught:
        parse_epsilon(text)
    message = str(caught.value)
    assert repr(text) in message
    assert "type for example threat.epsilon=8/255" in message
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"norm": "l3"}, ["threat.norm=l3", "linf, l2, l1, l0"]),
        ({"access": "white-box"}, ["threat.access=white-box", "gradients, scores, labels"]),
        ({"epsilon": -0.1}, ["threat.epsilon=-0.1", "type", "8/255"]),
        ({"epsilon": 8}, ["threat.epsilon=8", "type threat.epsilon=8/255"]),
        ({"norm": "l0", "epsilon": 1.5}, ["threat.epsilon=1.5", "type for example"]),
        ({"epsilon": "8/0"}, ["'8/0'", "type for example"]),
        ({"query_budget": 0}, ["threat.query_budget=0", "type threat.query_budget=null"]),
        ({"query_budget": -5}, ["threat.query_budget=-5", "type threat.query_budget=null"]),
    ],
)
def test_a_wrong_threat_model_is_one_sentence(settings: dict[str, object], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        ThreatModel(**{"norm": "linf", "epsilon": 0.1, **settings})
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    assert not re.search(r"\. [A-Z]", message)
    for part in says:
        assert part in message


def test_the_widest_radii_are_allowed() -> None:
    assert ThreatModel(norm="linf", epsilon=1).epsilon == 1
    assert ThreatModel(norm="l2", epsilon="12").epsilon == 12
    assert ThreatModel(norm="l0", epsilon="3").epsilon == 3
    assert ThreatModel(norm="l1", epsilon=0).epsilon == 0


def test_access_is_a_ladder() -> None:
    granted = {
        (grant, need): ThreatModel(norm="l2", epsilon=1, access=grant).allows(need)
        for grant, need in product(("gradients", "scores", "labels"), repeat=2)
    }
    assert granted == {
        ("gradients", "gradients"): True,
        ("gradients", "scores"): True,
        ("gradients", "labels"): True,
        ("scores", "gradients"): False,
        ("scores", "scores"): True,
        ("scores", "labels"): True,
        ("labels", "gradients"): False,
        ("labels", "scores"): False,
        ("labels", "labels"): True,
    }


def test_sizes() -> None:
    x = torch.zeros(2, 3, 2, 2)
    x_adv = x.clone()
    x_adv[0, :, 0, 0] = torch.tensor([0.25, 0.5, 0])
    x_adv[0, 1, 1, 1] = 0.25
    sizes = {norm: ThreatModel(norm=norm, epsilon=1).size(x_adv, x) for norm in NORMS}
    assert sizes["linf"].tolist() == [0.5, 0]
    assert sizes["l2"].tolist() == [0.375**0.5, 0]
    assert sizes["l1"].tolist() == [1, 0]
    # Two positions, although three channel values changed.
    assert sizes["l0"].tolist() == [2, 0]
    assert all(size.dtype == torch.float64 for size in sizes.values())


@norms
def test_check_names_image_size_and_epsilon(norm: Norm) -> None:
    x = torch.full((5, 3, 4, 4), 0.5)
    x_adv = x.clone()
    x_adv[3, 0, :2, :2] = 0.75
    epsilon, size = {
        "linf": (0.2, "0.25"),
        "l2": (0.4, "0.5"),
        "l1": (0.9, "1"),
        "l0": (3, "4"),
    }[norm]
    with pytest.raises(BudgetError) as caught:
        ThreatModel(norm=norm, epsilon=epsilon).check(x_adv, x)
    assert caught.value.image == 3
    assert f"image 3: a perturbation of {norm} size {size} exceeds epsilon {epsilon}" in str(
        caught.value
    )


@pytest.mark.parametrize(("excess", "allowed"), [(0.9e-6, True), (1.1e-6, False)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_budget_is_kept_to_a_millionth(norm: Norm, excess: float, allowed: bool) -> None:
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] = 0.5 + excess
    threat = ThreatModel(norm=norm, epsilon=0.5)
    if allowed:
        threat.check(x_adv, x)
    else:
        with pytest.raises(BudgetError, match="exceeds epsilon"):
            threat.check(x_adv, x)


@pytest.mark.parametrize(("excess", "allowed"), [(0.9e-6, True), (1.1e-6, False)])
@pytest.mark.parametrize("edge", [0, 1])
@norms
def test_the_box_is_kept_to_a_millionth(
    norm: Norm, edge: int, excess: float, allowed: bool
) -> None:
    x = torch.full((2, 1, 2, 2), float(edge), dtype=torch.float64)
    x_adv = x.clone()
    x_adv[1, 0, 0, 1] += excess * (2 * edge - 1)
    threat = ThreatModel(norm=norm, epsilon=1)
    if allowed:
        threat.check(x_adv, x)
    else:
        with pytest.raises(BudgetError, match=r"image 1: pixels from .* leave \[0, 1\]"):
            threat.check(x_adv, x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@norms
def test_what_is_no_number_is_refused(norm: Norm, value: float) -> None:
    x = images()
    x_adv = x.clone()
    x_adv[4, 1, 2, 3] = value
    with pytest.raises(BudgetError, match="image 4: the attack returned NaN or infinity"):
        ThreatModel(norm=norm, epsilon=1).check(x_adv, x)


@norms
def test_another_shape_is_refused(norm: Norm) -> None:
    with pytest.raises(BudgetError, match=r"shape \(5, 3, 4, 5\); expected \(6, 3, 4, 5\)"):
        ThreatModel(norm=norm, epsilon=1).check(images()[:5], images())


def test_an_empty_batch_is_fine() -> None:
    x = images(0)
    for norm in NORMS:
        threat = ThreatModel(norm=norm, epsilon=1)
        threat.check(threat.project(x, x), x)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    count=st.integers(1, 4),
    radius=st.floats(0, 1),
    spread=st.sampled_from([1e-6, 0.01, 1, 100]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 5),
)
def test_projections_stay_inside_and_are_idempotent(
    norm: Norm,
    shape: tuple[int, int, int],
    count: int,
    radius: float,
    spread: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    x = images(count, shape, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    wanted = x + spread * torch.randn(x.shape, generator=generator, dtype=dtype)
    largest = {"linf": 1.0, "l2": x[0].numel() ** 0.5, "l1": float(x[0].numel()), "l0": 9.0}[norm]
    epsilon = radius * largest if norm != "l0" else int(radius * largest)
    threat = ThreatModel(norm=norm, epsilon=epsilon)
    before = wanted.clone(), x.clone()

    once = threat.project(wanted, x)

    threat.check(once, x)
    assert torch.equal(wanted, before[0])
    assert torch.equal(x, before[1])
    assert once.dtype == dtype
    assert once.shape == x.shape
    torch.testing.assert_close(threat.project(once, x), once, rtol=0, atol=2e-6)


@norms
def test_what_is_inside_is_not_moved(norm: Norm) -> None:
    x = images()
    threat = ThreatModel(norm=norm, epsilon=1)
    start = threat.random_start(x, Draws(x, 0))
    assert torch.equal(threat.project(start, x), start)
    assert torch.equal(threat.project(x, x), x)


@norms
def test_random_starts_are_inside_and_belong_to_the_image(norm: Norm) -> None:
    x = images(40)
    threat = ThreatModel(norm=norm, epsilon={"linf": 0.1, "l2": 1, "l1": 5, "l0": 3}[norm])
    start = threat.random_start(x, Draws(x, 0))
    threat.check(start, x)
    assert (threat.size(start, x) > 0).all()
    assert torch.equal(threat.random_start(x[7:9], Draws(x[7:9], 0)), start[7:9])
    assert not torch.equal(threat.random_start(x, Draws(x, 1)), start)


def test_random_starts_fill_the_ball_uniformly() -> None:
    """Far from the box: the share of the volume inside a radius is the radius to the power D."""
    x = 0.5 + torch.linspace(-1e-3, 1e-3, 4000).view(-1, 1, 1, 1).expand(-1, 1, 2, 3).contiguous()
    for norm in ("linf", "l2", "l1"):
        threat = ThreatModel(norm=norm, epsilon=0.2)
        start = threat.random_start(x, Draws(x, 0))
        share = (threat.size(start, x).numpy() / 0.2) ** 6
        assert stats.kstest(share, "uniform").pvalue > 1e-3
        delta = (start - x).flatten(1).double()
        assert float(delta.mean(0).abs().max()) < 5 * 0.2 / 4000**0.5
        # No direction is preferred: signs are fair and unrelated.
        signs = np.corrcoef(delta.sign().numpy().T) - np.eye(6)
        assert np.abs(signs).max() < 5 / 4000**0.5


def test_random_l0_starts_choose_pixels_evenly() -> None:
    x = torch.linspace(0.1, 0.9, 3000).view(-1, 1, 1, 1).expand(-1, 3, 3, 3).contiguous()
    start = ThreatModel(norm="l0", epsilon=2).random_start(x, Draws(x, 0))
    changed = (start != x).any(1).flatten(1)
    assert (changed.sum(1) == 2).all()
    assert stats.chisquare(changed.sum(0).numpy()).pvalue > 1e-3
    assert stats.kstest(start[start != x].double().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-8, 1, 1e8, 1e30])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_directions_have_unit_size_whatever_the_gradient(norm: Norm, scale: float) -> None:
    x = torch.full((4, 3, 8, 8), 0.5)
    gradient = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel(norm=norm, epsilon=1)
    direction = threat.direction(gradient, x, 0.01)
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(threat.size(direction, 0 * x), ones, rtol=1e-5, atol=0)
    assert (direction * gradient >= 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_zero_gradient_gives_no_step(norm: Norm) -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    gradient = torch.zeros_like(x)
    gradient[1, 0, 0, 0] = -2
    direction = ThreatModel(norm=norm, epsilon=1).direction(gradient, x, 0.01)
    assert torch.equal(direction, gradient / 2)


def test_the_l2_direction_is_the_gradient() -> None:
    gradient = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    direction = ThreatModel(norm="l2", epsilon=1).direction(gradient, gradient, 0.01)
    cosine = torch.nn.functional.cosine_similarity(direction.flatten(1), gradient.flatten(1))
    assert float(cosine.min()) > 1 - 1e-6


def test_the_l1_direction_spends_nothing_at_the_box() -> None:
    """The steepest entries can't move; all of the step goes to those that can."""
    x = torch.zeros(1, 1, 20, 20)
    x.view(-1)[200:] = 0.5
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    gradient.view(-1)[:200] = -10
    direction = ThreatModel(norm="l1", epsilon=1).direction(gradient, x, 0.01)
    moving = direction.flatten()[200:]
    assert float(moving.abs().sum()) == pytest.approx(1)
    steepest = gradient.flatten()[200:].abs().argmax()
    assert float(moving[steepest]) != 0


def test_no_gradient_step_under_l0() -> None:
    x = images()
    with pytest.raises(UserError, match="choose an l0 attack"):
        ThreatModel(norm="l0", epsilon=1).direction(x, x, 0.01)

"""The Square attack: its parts against their definition, its strength and its cost."""

import importlib
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from conftest import LinearVictim, NoisyLogits, accuracy
from test_closed_forms import images, margins, middling_epsilon, predict, victim
from torch import Tensor, nn

from robustbench_local.attacks import PGD, Square
from robustbench_local.attacks.square_windows import (
    eta,
    propose_l1,
    propose_l2,
    propose_linf,
    side_length,
    stripes,
    tiles_l1,
    tiles_l2,
)
from robustbench_local.errors import UserError
from robustbench_local.oracle import Oracle
from robustbench_local.randomness import Draws
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Norm

norms = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


def threat(norm: Norm, epsilon: float, **keywords: Any) -> ThreatModel:
    return ThreatModel(norm=norm, epsilon=epsilon, access="scores", **keywords)


class Counting(nn.Module):
    """A victim that remembers how often it was asked about each of the images told apart."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model, self.x = model, x
        self.asked = torch.zeros(len(x), dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        # Perturbations are small beside the distance between images.
        owner = torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(1)
        self.asked += torch.bincount(owner, minlength=len(self.x))
        return self.model(x)


def test_the_first_windows_and_how_they_shrink() -> None:
    """Halved after 10, 50, 200, 500, 1,000, 2,000, 4,000, 6,000 and 8,000 of 10,000 queries."""
    x = torch.zeros(1, 3, 32, 32)
    sides = [
        side_length(0.8, queries / 10_000, x, odd=False)
        for queries in (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999)
    ]
    # round(sqrt(0.8 * 1024 / 2 ** halvings))
    assert sides == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 2, 1, 1]
    assert side_length(0.8, 0, torch.zeros(1, 3, 8, 40), odd=False) == 8
    odd = [side_length(0.1, queries / 10_000, x, odd=True) for queries in (0, 11, 51, 9999)]
    assert odd == [11, 7, 5, 3]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 11])
def test_eta_is_two_opposite_bumps_of_length_1(side: int, length: Literal[1, 2]) -> None:
    shape = eta(side, length)
    assert float(shape.norm(p=length)) == pytest.approx(1)
    upper, lower = shape[: side // 2], shape[side // 2 :]
    assert (upper > 0).all()
    assert (lower < 0).all()
    # Highest in the middle of each half.
    if side >= 5:
        assert int(upper.argmax()) == (side // 2 // 2) * side + side // 2
        assert int(lower.argmin()) == ((side - side // 2) // 2) * side + side // 2


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("side", [3, 5, 7, 11, 25])
def test_eta_is_the_authors(side: int, length: Literal[1, 2]) -> None:
    library = importlib.import_module("pyautoattack.square")
    theirs = library.SquareAttack(nn.Identity(), norm=f"L{length}", device="cpu")
    with torch.random.fork_rng([]):
        torch.manual_seed(side)
        expected = theirs.eta(side)  # turned half of the time
    shape = eta(side, length).float()
    assert torch.allclose(shape, expected, atol=1e-6) or torch.allclose(
        shape.T, expected, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 7, 12), (3, 11, 5), (4, 3, 3)], ids=str)
def test_windows_of_any_shape_stay_inside_and_spend_the_budget(
    shape: tuple[int, int, int],
) -> None:
    """Away from the box every proposal lies on the sphere (l2, l1) or at its corners (linf)."""
    x = 0.5 + 0.01 * torch.rand(50, *shape, generator=torch.Generator().manual_seed(0))
    draws = Draws(x, 1)
    radius = torch.linspace(0.05, 0.2, 50).view(-1, 1, 1, 1)
    moves = ((stripes, propose_linf), (tiles_l2, propose_l2), (tiles_l1, propose_l1))
    for begin, propose in moves:
        x_adv = begin(x, radius, draws)
        touched = torch.zeros_like(x, dtype=torch.bool)
        for _ in range(60):
            before = x_adv.clone()
            odd = propose is not propose_linf
            edits = propose(x, x_adv, radius, side_length(0.2, 0.3, x, odd=odd), draws)
            for edit in edits:
                edit.write(x_adv)
            changed = x_adv != before
            if not odd:  # else both windows may be empty
                assert changed.flatten(1).any(1).all()
            touched |= changed
            if odd:
                length = (x_adv - x).flatten(1).norm(dim=1, p=2 if propose is propose_l2 else 1)
                torch.testing.assert_close(length, radius.flatten(), rtol=1e-4, atol=0)
            else:
                torch.testing.assert_close((x_adv - x).abs(), radius.expand_as(x))
            # Half of the proposals are taken back, bit by bit.
            accepted = torch.arange(50) % 2 == 0
            for edit in edits:
                edit.write(x_adv, accepted)
            assert torch.equal(x_adv[1::2], before[1::2])
        assert touched.any(0).all(), "some pixel is never reached"


@norms
def test_breaks_what_can_be_broken(norm: Norm) -> None:
    model, x = victim((1, 8, 8), 2), images((1, 8, 8), 60)
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm)
    share = {"linf": 0.97, "l2": 0.8, "l1": 0.7}[norm]
    breakable = margins(model, x, y, norm, share * epsilon)[:, 0] < 0
    safe = margins(model, x, y, norm, epsilon)[:, 0] > 1e-4
    x_adv = Square(queries=1000)(model, x, y, threat(norm, epsilon))
    threat(norm, epsilon).check(x_adv, x)
    broken = (predict(model, x_adv) != y).numpy()
    assert breakable.sum() >= 18
    assert (broken & breakable).sum() >= 0.95 * breakable.sum()
    assert not (broken & safe).any()


@pytest.mark.slow
@norms
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 10, 10)], ids=str)
def test_as_strong_as_the_authors(norm: Norm, shape: tuple[int, int, int]) -> None:
    library = importlib.import_module("pyautoattack.square")
    model, x = victim(shape, 5), images(shape, 200)
    y = predict(model, x)
    epsilon, queries = middling_epsilon(model, x, y, norm), 300
    theirs = library.SquareAttack(
        model, norm=norm.capitalize(), n_queries=queries, eps=epsilon, p_init=0.8, seed=0,
        verbose=False, device="cpu",
    )  # fmt: skip
    with torch.random.fork_rng([]), torch.no_grad():
        authors = accuracy(model, theirs.perturb(x, y), y)
    mine = accuracy(model, Square(queries=queries)(model, x, y, threat(norm, epsilon)), y)
    # Two runs of either scatter by a point or two on 200 images.
    assert mine <= authors + 0.02


@pytest.mark.slow
@norms
@pytest.mark.parametrize("variant", ["shift", "scale"])
def test_no_disguise_of_the_logits_helps(norm: Norm, variant: str) -> None:
    plain, x = victim((1, 8, 8), 5), images((1, 8, 8), 60)
    y = predict(plain, x)
    budget = threat(norm, middling_epsilon(plain, x, y, norm))
    change = {"shift": {"shift": -50.0}, "scale": {"scale": 1e3}}[variant]
    disguised = LinearVictim(plain.weight.data, plain.bias.data, **change)
    attack = Square(queries=150)
    one, other = (accuracy(plain, attack(m, x, y, budget), y) for m in (plain, disguised))
    assert 0.1 < one < 0.9
    # A rounding of the scores decides now and then.
    assert abs(one - other) <= 0.02


@norms
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("query_budget", [None, 25, 1])
@pytest.mark.parametrize("target", [None, "next"])
def test_queries_are_counted_exactly(
    norm: Norm, restarts: int, query_budget: int | None, target: str | None
) -> None:
    """What is not broken costs all of its queries, and nothing costs more."""
    model, x = victim((1, 8, 8), 5), images((1, 8, 8), 30)
    y = predict(model, x)
    small = {"linf": 0.004, "l2": 0.03, "l1": 0.1}[norm]
    budget = threat(norm, small, query_budget=query_budget)
    attack = Square(queries=20, restarts=restarts, target=target)
    allowed = min(20 * restarts, query_budget or 1000)

    counting = Counting(model, x)
    x_adv = attack(counting, x, y, budget)
    wanted = y if target is None else (y + 1) % 5
    short = (predict(model, x_adv) == wanted) == (target is None)
    assert short.sum() >= 10
    # Asking for the number of classes costs one: of the first image, but all are charged.
    counting.asked[0] -= int(target is not None)
    assert (counting.asked <= allowed).all()
    assert (counting.asked[short] == allowed - int(target is not None)).all()

    oracle = Oracle(model, budget, 5)
    oracle.begin(len(x))
    assert torch.equal(attack(oracle, x, y, budget), x_adv)


@norms
def test_a_radius_for_each_example(norm: Norm) -> None:
    model, x = victim((3, 6, 6), 5), images((3, 6, 6), 24)
    y = predict(model, x)
    epsilon = middling_epsilon(model, x, y, norm)
    radii = epsilon * torch.tensor([0.5, 1.0, 1.5]).repeat(8)
    attack = Square(queries=60)
    together = attack(model, x, y, threat(norm, 1).per_example(radii))
    for place in range(3):
        rows = torch.arange(place, 24, 3)
        one = threat(norm, float(radii[place].double()))
        torch.testing.assert_close(
            together[rows], attack(model, x[rows], y[rows], one), rtol=0, atol=1e-6
        )


def test_restarts_attack_the_survivors_only(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:60] for part in digit_images)
    one, three = (
        predict(digit_model, Square(queries=60, restarts=n)(digit_model, x, y, threat("linf", 0.1)))
        != y
        for n in (1, 3)
    )
    assert (one <= three).all()
    assert one.sum() < three.sum()


def test_targets_are_reached(digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:60] for part in digit_images)
    attack = Square(queries=800, target="next")
    budget = ThreatModel(norm="linf", epsilon=0.3)
    scored, climbed = (
        (predict(digit_model, attack(digit_model, x, y, budget)) == (y + 1) % 10).double().mean()
        for attack in (attack, PGD(target="next"))
    )
    assert scored >= climbed - 0.05 > 0.8


@norms
def test_an_undefended_network_is_broken(
    norm: Norm, digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:100] for part in digit_images)
    budget = threat(norm, {"linf": 0.3, "l2": 5, "l1": 60}[norm])
    x_adv = Square(queries=1000)(digit_model, x, y, budget)
    budget.check(x_adv, x)
    assert accuracy(digit_model, x_adv, y) <= 0.01


def test_noise_on_the_scores_stops_nothing() -> None:
    """Every image is asked about to the end, and the point returned is good without the noise."""
    plain, x = victim((1, 8, 8), 2), images((1, 8, 8), 30)
    y = predict(plain, x)
    epsilon = middling_epsilon(plain, x, y, "linf")
    deviation = float(margins(plain, x, y, "linf", 0).std() / 40)
    noisy = NoisyLogits(plain, deviation)
    noisy.randomized = True
    counting = Counting(noisy, x)
    attack = Square(queries=1200, eot_samples=2)
    x_adv = attack(counting, x, y, threat("linf", epsilon))
    assert (counting.asked <= 1200).all()
    assert (counting.asked >= 1200 - 4).all()
    possible = margins(plain, x, y, "linf", 0) - margins(plain, x, y, "linf", epsilon)
    reached = margins(plain, x, y, "linf", 0) - margins(plain, x_adv, y, "linf", 0)
    assert (reached / possible).mean() >= 0.6


@pytest.mark.slow
def test_on_a_robust_network_stronger_than_pgd_and_as_strong_as_the_authors(
    robust_digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    """Published for MNIST under linf 0.3: below every plain PGD, restarts included."""
    library = importlib.import_module("pyautoattack.square")
    x, y = digit_images
    right = predict(robust_digit_model, x) == y
    x, y = x[right][:100], y[right][:100]
    budget, queries = threat("linf", 0.3), 2000
    x_adv = Square(queries=queries)(robust_digit_model, x, y, budget)
    budget.check(x_adv, x)
    theirs = library.SquareAttack(
        robust_digit_model, norm="Linf", n_queries=queries, eps=0.3, p_init=0.8, seed=0,
        verbose=False, device="cpu",
    )  # fmt: skip
    with torch.random.fork_rng([]), torch.no_grad():
        x_theirs = theirs.perturb(x, y)
    mine, authors = (accuracy(robust_digit_model, part, y) for part in (x_adv, x_theirs))
    plain = PGD()(robust_digit_model, x, y, ThreatModel(norm="linf", epsilon=0.3))
    # Two runs of either scatter by 1 point on so few images.
    assert mine <= authors + 0.02
    assert mine <= accuracy(robust_digit_model, plain, y)


@pytest.mark.parametrize(
    "wrong",
    [
        {"queries": 0},
        {"restarts": 0},
        {"initial_share": 0.0},
        {"initial_share": 1.5},
        {"initial_share": float("nan")},
        {"eot_samples": 0},
        {"queries": 5, "eot_samples": 6},
        {"target": -1},
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"attack\."):
        replace(Square(), **wrong)

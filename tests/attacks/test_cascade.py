"""A cascade of attacks whose every move is known."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from conftest import accuracy
from torch import Tensor, nn

from robustbench_local.attacks import APGD, PGD, Attack, Cascade, Noise, Transfer
from robustbench_local.errors import UserError
from robustbench_local.oracle import Oracle
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Norm

THREAT = ThreatModel(norm="linf", epsilon=0.5)


class Switch(nn.Module):
    """Right (class 0) unless the second pixel is above 0.6."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1)[:, 1] - 0.6
        return torch.stack((-score, score), 1)


def numbered(count: int) -> tuple[Tensor, Tensor]:
    """Images whose first pixel is their number in hundredths, all of class 0."""
    x = torch.full((count, 1, 2, 2), 0.4)
    x[:, 0, 0, 0] = torch.arange(count) / 100
    return x, torch.zeros(count, dtype=torch.int64)


def numbers(x: Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * 100).round().int().tolist()


@dataclass(frozen=True, kw_only=True)
class Scripted(Attack):
    """Breaks the images of certain numbers, claims nothing, and writes down what it was given."""

    needs: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2"})

    breaks: frozenset[int] = frozenset()
    queries: int = 0
    mark: float = 0.4
    seen: list[list[int]] = field(default_factory=list)

    def run(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
        assert (x[:, 0, 0, 1] == 0.4).all(), "not the clean images"
        assert len(x) == len(y)
        self.seen.append(numbers(x))
        for _ in range(self.queries):
            model(x)
        x_adv = x.clone()
        x_adv[:, 0, 1, 1] = self.mark
        for row, number in enumerate(numbers(x)):
            x_adv[row, 0, 0, 1] = 0.7 if number in self.breaks else 0.5
        return x_adv


@dataclass(frozen=True, kw_only=True)
class LinfOnly(Scripted):
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})


@dataclass(frozen=True, kw_only=True)
class Greedy(Scripted):
    needs: ClassVar[Access] = "gradients"


def test_each_part_gets_the_survivors_in_order() -> None:
    first = Scripted(breaks=frozenset({1, 4}), mark=0.1)
    nothing = Scripted(mark=0.2)
    last = Scripted(breaks=frozenset({0, 1, 3}), mark=0.3)
    never = Scripted(mark=0.35)
    end = Scripted(breaks=frozenset({2}), mark=0.45)
    x, y = numbered(5)

    cascade = Cascade(parts={"a": first, "b": nothing, "c": last, "d": end, "e": never})
    x_adv = cascade(Switch(), x, y, THREAT)

    assert first.seen == [[0, 1, 2, 3, 4]]
    assert nothing.seen == [[0, 2, 3]]
    assert last.seen == [[0, 2, 3]]
    assert end.seen == [[2]]
    assert never.seen == []
    assert numbers(x_adv) == [0, 1, 2, 3, 4]
    # Who broke each image: the part's own mark.
    expected = torch.tensor([0.3, 0.1, 0.45, 0.3, 0.1])
    torch.testing.assert_close(x_adv[:, 0, 1, 1], expected)


def test_what_nothing_breaks_comes_back_inside_the_budget() -> None:
    x, y = numbered(3)
    x_adv = Cascade(parts={"a": Scripted(), "b": Scripted()})(Switch(), x, y, THREAT)
    THREAT.check(x_adv, x)
    assert (Switch()(x_adv).argmax(1) == y).all()


def test_the_tally_by_hand() -> None:
    """Two batches of 4 and 2 images; every look after a part is a forward pass of its own."""
    parts = {
        "a": Scripted(breaks=frozenset({0, 1, 5}), queries=2),
        "b": Scripted(breaks=frozenset({2}), queries=3),
    }
    cascade, oracle = Cascade(parts=parts), Oracle(Switch(), THREAT, 2)
    x, y = numbered(6)
    for rows in (slice(0, 4), slice(4, 6)):
        cascade(oracle, x[rows], y[rows], THREAT)
    a, b = cascade.report(THREAT)["parts"]
    seconds = [part.pop("seconds") for part in (a, b)]
    assert min(seconds) > 0
    assert a == {"name": "a", "attacked": 6, "broken": 3, "forward": 18, "backward": 0}
    assert b == {"name": "b", "attacked": 3, "broken": 1, "forward": 12, "backward": 0}
    assert oracle.forward_passes == 30


def test_backward_passes_are_counted() -> None:
    x, y = numbered(4)
    cascade = Cascade(parts={"pgd": PGD(steps=3, early_stop=False, best_iterate=False)})
    oracle = Oracle(Switch(), THREAT, 2)
    cascade(oracle, x, y, THREAT)
    (line,) = cascade.report(THREAT)["parts"]
    assert (line["forward"], line["backward"]) == (16, 12)


def test_each_radius_of_a_curve_has_its_own_lines() -> None:
    cascade = Cascade(parts={"a": Scripted(breaks=frozenset({1}))})
    x, y = numbered(2)
    wide, narrow = (ThreatModel(norm="linf", epsilon=epsilon) for epsilon in (0.5, 0.4))
    cascade(Switch(), x, y, wide)
    cascade(Switch(), x[:1], y[:1], narrow)
    for threat, attacked in ((wide, 2), (narrow, 1)):
        (line,) = cascade.report(threat)["parts"]
        assert (line["name"], line["attacked"]) == ("a", attacked)


def test_parts_that_do_not_serve_the_norm() -> None:
    x, y = numbered(2)
    cascade = Cascade(parts={"a": Scripted(), "b": LinfOnly(breaks=frozenset({1}))})
    assert cascade.norms == {"linf"}
    with pytest.raises(UserError, match=r"threat.norm=l2; it serves linf"):
        cascade(Switch(), x, y, ThreatModel(norm="l2", epsilon=0.5))


def test_it_needs_what_its_neediest_part_needs() -> None:
    x, y = numbered(2)
    assert Cascade(parts={"a": Noise()}).needs == "labels"
    assert Cascade(parts={"a": Noise(), "b": Scripted()}).needs == "scores"
    cascade = Cascade(parts={"a": Noise(), "b": Greedy(), "c": Scripted()})
    assert cascade.needs == "gradients"
    with pytest.raises(UserError, match="needs access to gradients"):
        cascade(Switch(), x, y, ThreatModel(norm="linf", epsilon=0.5, access="scores"))


def test_parts_are_prepared() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Prepared(Scripted):
        def fit(self, oracle: Oracle, data: object, threat: ThreatModel) -> "Prepared":
            return Prepared(breaks=frozenset({0}))

    x, y = numbered(2)
    oracle = Oracle(Switch(), THREAT, 2)
    fitted = Cascade(parts={"a": Scripted(), "b": Prepared()}).fit(oracle, None, THREAT)  # type: ignore[arg-type]
    assert Switch()(fitted(Switch(), x, y, THREAT)).argmax(1).tolist() == [1, 0]


class Coin(nn.Module):
    """Wrong with the probability that the second pixel says, drawn from torch's generator."""

    randomized = True

    def forward(self, x: Tensor) -> Tensor:
        wrong = (torch.rand(len(x)) < x.flatten(1)[:, 1]).float()
        return torch.stack((0.5 - wrong, wrong - 0.5), 1)


@dataclass(frozen=True, kw_only=True)
class Sets(Attack):
    """Sets the second pixel."""

    needs: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})

    value: float
    seen: list[int] = field(default_factory=list)

    def run(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
        self.seen.append(len(x))
        x_adv = x.clone()
        x_adv[:, 0, 0, 1] = self.value
        return x_adv


@pytest.mark.parametrize("eot_samples", [1, 40])
def test_of_a_randomised_victim_the_majority_decides(eot_samples: int) -> None:
    """Every part meets what is not always wrong; the most often wrong point is kept."""
    x, y = numbered(100)
    rarely, often, mostly = Sets(value=0.1), Sets(value=0.3), Sets(value=0.9)
    parts = {"a": often, "b": rarely, "c": mostly, "d": Sets(value=0.0)}
    cascade = Cascade(parts=parts, eot_samples=eot_samples)
    x_adv = cascade(Coin(), x, y, THREAT)
    broken = {part["name"]: part["broken"] for part in cascade.report(THREAT)["parts"]}
    # 0.3 against more than half of 10 draws: 4.7%; of 40: 0.2%.
    assert broken["a"] <= (15 if eot_samples == 1 else 3)
    assert broken["b"] <= 1
    assert broken["a"] + broken["b"] + broken["c"] >= 98
    assert float((x_adv[:, 0, 0, 1] == 0.9).float().mean()) >= 0.84
    # 0.3 or 0.1 in every one of 10 draws: never; 0.9: 35% of the images, in all of 40 1.5%.
    assert rarely.seen == mostly.seen == [100]

    kept = Cascade(parts={"a": often, "b": rarely}, eot_samples=40)(Coin(), x, y, THREAT)
    assert float((kept[:, 0, 0, 1] == 0.3).float().mean()) >= 0.95


def test_a_real_cascade_is_the_worst_case_of_its_parts(
    digit_model: nn.Module, digit_images: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:100] for part in digit_images)
    threat = ThreatModel(norm="linf", epsilon=0.1)
    parts = {"noise": Noise(), "ce": PGD(steps=4, step_size=0.4), "dlr": APGD(loss="dlr", steps=9)}
    broken = torch.zeros(len(x), dtype=torch.bool)
    for part in parts.values():
        broken |= digit_model(part(digit_model, x, y, threat)).argmax(1) != y
    cascade = Cascade(parts=parts)
    assert accuracy(digit_model, cascade(digit_model, x, y, threat), y) == pytest.approx(
        float((~broken).double().mean()), abs=0.011
    )
    lines = cascade.report(threat)["parts"]
    assert [line["name"] for line in lines] == list(parts)
    for before, after in pairwise(lines):
        assert after["attacked"] == before["attacked"] - before["broken"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"parts": {}}, "attack.parts is empty"),
        ({"parts": {"a": Transfer()}}, "attack.parts.a is a transfer attack"),
        ({"parts": {"a": 3}}, "attack.parts.a is int; expected an attack"),
        ({"parts": {"a": PGD(target=3)}}, "attack.parts.a.target=3"),
        ({"parts": {"a": Noise()}, "eot_samples": 0}, "attack.eot_samples=0"),
        ({"parts": {"a": Noise()}, "only_if_random": ["b"]}, "attack.only_if_random names b"),
        ({"parts": {"a": Noise()}, "only_if_random": ["a"]}, "no part for deterministic victims"),
        ({"parts": {"a": Noise()}, "skip_if_random": ["a"]}, "no part for random victims"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        Cascade(**wrong)  # type: ignore[arg-type]


def test_a_query_budget_is_refused() -> None:
    x, y = numbered(1)
    threat = ThreatModel(norm="linf", epsilon=0.1, query_budget=100)
    with pytest.raises(UserError, match=r"threat.query_budget=100 cannot be shared out"):
        Cascade(parts={"a": Noise()})(Switch(), x, y, threat)


def test_looks_after_a_part_are_no_samples_of_its_gradients() -> None:
    """What the audit believes about randomised victims is what the weakest part does."""
    parts = {"plain": PGD(steps=2), "averaged": PGD(steps=2, eot_samples=20)}
    assert Cascade(parts=parts, eot_samples=20).draws_averaged == 1
    assert Cascade(parts={"averaged": parts["averaged"]}).draws_averaged == 20


def test_random_victims_meet_parts_of_their_own() -> None:
    x, y = numbered(10)
    parts = {"both": Sets(value=0.1), "moving": Sets(value=0.1), "many": PGD(eot_samples=20)}
    cascade = Cascade(parts=parts, skip_if_random=["moving"], only_if_random=["many"])
    assert cascade.draws_averaged == 1
    assert replace(cascade, skip_if_random=["both", "moving"]).draws_averaged == 20

    def met(victim: nn.Module) -> list[str]:
        fresh = replace(cascade, parts={name: Sets(value=0.0) for name in parts})
        fresh(victim, x, y, THREAT)
        return [part["name"] for part in fresh.report(THREAT)["parts"]]

    assert met(Switch()) == ["both", "moving"]
    assert met(Coin()) == ["both", "many"]

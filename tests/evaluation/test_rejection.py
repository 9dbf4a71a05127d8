"""How rejections are judged, counted and recorded: every branch by hand."""

import json
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_local.attacks import Attack
from robustbench_local.data import Dataset, Split
from robustbench_local.errors import UserError
from robustbench_local.evaluation import Judging, PerExample, evaluate, judge
from robustbench_local.evaluation.audit.trials import Trials
from robustbench_local.oracle import Oracle
from robustbench_local.results.metrics import measure, measure_detection
from robustbench_local.results.record import comparability
from robustbench_local.results.store import RECORD_VERSION, Store
from robustbench_local.threat import ThreatModel

CLASSES = 3
REJECTED = CLASSES
EVERYTHING = ThreatModel(norm="linf", epsilon=1)

# What the victim answers to an image whose pixels are all this value times 1/255.
ANSWERS = {
    0: 0, 10: 1, 20: 2, 30: REJECTED,
}  # fmt: skip


class Table(nn.Module):
    """Looks its answer up by the grey of the image. Of a rejected image class 1 is the largest."""

    abstains = True

    def forward(self, x: Tensor) -> Tensor:
        grey = (x.flatten(1).mean(1) * 255).round().long().tolist()
        logits = torch.zeros(len(x), CLASSES + 1)
        for row, value in enumerate(grey):
            answer = ANSWERS[value]
            logits[row, answer if answer < CLASSES else 1] = 2
            logits[row, REJECTED] = 2.5 if answer == REJECTED else -value / 100
        return logits + 0 * x.flatten(1)[:, :1]


class Lazy(Table):
    """The same without rejection: what an attack faces that does not know of it."""

    abstains = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :CLASSES]


class Repaint(Attack):
    """Paints the images it is given in the greys it was told, by position in the test set."""

    needs = "labels"
    norms = frozenset({"linf"})

    def __init__(self, greys: dict[int, int]) -> None:
        super().__init__()
        object.__setattr__(self, "greys", greys)

    def run(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
        now = (x.flatten(1).mean(1) * 255).round().long().tolist()
        new = torch.tensor([self.greys.get(grey, grey) for grey in now])
        return (new / 255).view(-1, 1, 1, 1).expand_as(x).float()


def split(greys: list[int], labels: list[int]) -> Split:
    images = torch.tensor(greys, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return Split(images.contiguous(), torch.tensor(labels), torch.arange(len(greys)))


def outcome(
    greys: list[int], labels: list[int], paint: dict[int, int], *, batch_size: int = 2
) -> PerExample:
    oracle = Oracle(Table(), EVERYTHING, CLASSES)
    found = evaluate(oracle, Repaint(paint), split(greys, labels), batch_size=batch_size)
    return found.examples


@pytest.mark.parametrize(
    ("grey", "label", "painted", "clean", "robust", "attacked"),
    [
        (0, 0, 0, 1, 1, True),  # accepted and right, and still after the attack
        (0, 0, 10, 1, 0, True),  # accepted and wrong after it
        (0, 0, 30, 1, 1, True),  # rejected after it, whatever class is the largest
        (10, 1, 30, 1, 1, True),
        (10, 0, 30, 0, 0, False),  # accepted and wrong before: not attacked, never robust
        (30, 1, 10, 0, 0, False),  # rejected before, although its largest class is right
        (30, 0, 0, 0, 0, False),  # rejected before
    ],
)
def test_an_image(
    grey: int, label: int, painted: int, clean: int, robust: int, attacked: bool
) -> None:
    examples = outcome([grey], [label], {grey: painted})
    assert examples.clean_correct.tolist() == [clean]
    assert examples.robust_correct.tolist() == [robust]
    assert examples.attacked.tolist() == [attacked]
    after = painted if attacked else grey
    assert examples.clean_prediction.tolist() == [ANSWERS[grey]]
    assert examples.adversarial_prediction.tolist() == [ANSWERS[after]]
    assert examples.clean_rejected.tolist() == [ANSWERS[grey] == REJECTED]
    assert examples.adversarial_rejected.tolist() == [ANSWERS[after] == REJECTED]
    assert examples.clean_suspicion.tolist() == pytest.approx([suspicion(grey)])
    assert examples.adversarial_suspicion.tolist() == pytest.approx([suspicion(after)])
    # The classes share all probability among themselves.
    assert examples.clean_probabilities.shape == (1, CLASSES)
    assert float(examples.clean_probabilities.astype(float).sum()) == pytest.approx(1, abs=1e-2)


def suspicion(grey: int) -> float:
    return 0.5 if ANSWERS[grey] == REJECTED else -grey / 100 - 2


GREYS, LABELS = [0, 10, 20, 30, 30, 10, 0], [0, 1, 2, 0, 1, 0, 0]
PAINT = {0: 10, 10: 30, 20: 20}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_images_together_are_those_images_alone(batch_size: int) -> None:
    together = outcome(GREYS, LABELS, PAINT, batch_size=batch_size)
    alone = [outcome([g], [y], PAINT) for g, y in zip(GREYS, LABELS, strict=True)]
    for part in fields(PerExample):
        if part.name != "indices":
            expected = np.concatenate([getattr(one, part.name) for one in alone])
            assert np.array_equal(getattr(together, part.name), expected), part.name


def test_who_ignores_the_detector_is_judged_with_it() -> None:
    """The attack sees three classes and makes class 1 of everything, which grey 30 looks like."""
    data = split([0, 20], [0, 2])
    oracle = Oracle(Lazy(), EVERYTHING, CLASSES)
    attack = Repaint({0: 30, 20: 10})
    judged = evaluate(oracle, attack, data, batch_size=2, judging=Judging(victim=Table())).examples
    assert judged.robust_correct.tolist() == [1, 0]
    assert judged.adversarial_rejected.tolist() == [1, 0]
    alone = evaluate(oracle, attack, data, batch_size=2).examples
    assert alone.robust_correct.tolist() == [0, 0]
    assert alone.clean_rejected.size == alone.adversarial_suspicion.size == 0


class Hesitant(nn.Module):
    """Rejects any image in `share` of its draws; else it is right where the first pixel is 0."""

    abstains, randomized = True, True

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), CLASSES + 1)
        logits[:, 0] = 1
        logits[:, 1] = 2 * (x[:, 0, 0, 0] > 0).float()
        logits[:, REJECTED] = torch.where(torch.rand(len(x)) < self.share, 5.0, -5.0)
        return logits


def test_of_a_random_victim_rejections_are_shares_of_the_draws() -> None:
    data = split([0] * 200, [0] * 200)
    oracle = Oracle(Hesitant(1 / 3), EVERYTHING, CLASSES)
    judging = Judging(draws=60, seed=3)
    still = evaluate(oracle, Repaint({}), data, batch_size=200, judging=judging).examples
    assert still.clean_correct.mean() == pytest.approx(2 / 3, abs=0.02)
    assert still.clean_rejected.mean() == pytest.approx(1 / 3, abs=0.02)
    # Mostly accepted before; right or rejected after: in all draws.
    mostly = still.clean_correct > 0.5
    assert mostly.sum() > 190 and (still.robust_correct[mostly] == 1).all()
    moved = evaluate(oracle, Repaint({0: 9}), data, batch_size=200, judging=judging).examples
    # Only what is rejected after the attack counts.
    assert moved.robust_correct[mostly].mean() == pytest.approx(1 / 3, abs=0.02)
    assert moved.clean_suspicion.mean() == pytest.approx(5 / 3 - 10 / 3 - 1, abs=0.2)


def test_rejecting_what_is_mostly_rejected_when_clean_is_no_robustness() -> None:
    data = split([0] * 200, [0] * 200)
    oracle = Oracle(Hesitant(3 / 4), EVERYTHING, CLASSES)
    judging = Judging(draws=60, seed=3)
    still = evaluate(oracle, Repaint({}), data, batch_size=200, judging=judging).examples
    assert (still.clean_correct < 0.5).all()
    assert still.robust_correct.mean() == pytest.approx(1 / 4, abs=0.02)


class Boundary(Table):
    """Grey 10 is class 1, by the smallest difference that float32 has there."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        painted = (x.flatten(1).mean(1) * 255).round() == 10
        equal = torch.tensor([1e-3, 1e-3 + 1.2e-10, 0, -1])
        return torch.where(painted[:, None], equal, logits)


def test_a_point_on_the_boundary_fools_the_network() -> None:
    """In half precision, and in float32 too, the probabilities of both classes are equal."""
    oracle = Oracle(Boundary(), EVERYTHING, CLASSES)
    examples = evaluate(oracle, Repaint({0: 10}), split([0] * 4, [0] * 4), batch_size=4).examples
    assert examples.adversarial_prediction.tolist() == [1] * 4
    assert (examples.adversarial_probabilities.argmax(1) == 0).all()
    assert examples.adversarial_class.tolist() == [1] * 4
    found = measure_detection(examples)
    assert found is not None and found["fooling"] == 4


def test_the_judge_wants_one_more_logit_of_who_abstains() -> None:
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 0])
    verdict = judge(Table(), x, x, y, EVERYTHING, num_classes=CLASSES)
    assert verdict.correct.all() and not verdict.rejected.any() and len(verdict.suspicion) == 2
    with pytest.raises(UserError, match=r"returned \(2, 4\).*expected logits of shape \(2, 5\)"):
        judge(Table(), x, x, y, EVERYTHING, num_classes=4)
    with pytest.raises(UserError, match="labels run from 3 to 3"):
        judge(Table(), x, x, y + 3, EVERYTHING, num_classes=CLASSES)


def test_matrices_have_a_column_of_rejection_and_figures_leave_it_out() -> None:
    found = measure(outcome(GREYS, LABELS, PAINT), CLASSES)
    assert found["clean"]["confusion"] == [[2, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0]]
    assert found["attacked"]["confusion"] == [[0, 3, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0]]
    assert found["robust_accuracy_per_class"] == [0, 0.5, 1]
    # A rejected image is not recalled, and spoils no precision.
    assert found["clean"]["recall"] == pytest.approx([2 / 4, 1 / 2, 1])
    assert found["clean"]["precision"] == pytest.approx([1, 1 / 2, 1])
    share = float(torch.tensor([2.0, 0, 0]).softmax(0)[0])
    assert found["clean"]["confidence"]["wrong"] == pytest.approx(share, abs=1e-3)
    assert found["attacked"]["confidence"]["right"] == pytest.approx(share, abs=1e-3)
    everything_rejected = measure(outcome([30, 30], [0, 1], {}), CLASSES)
    assert everything_rejected["clean"]["confidence"] == {"right": None, "wrong": None}
    assert json.loads(json.dumps(found)) == found


def test_detection_by_hand() -> None:
    """Attacked are images 0, 1, 2 and 6; 0 and 6 become class 1, 1 is rejected as class 1."""
    examples = outcome(GREYS, LABELS, PAINT)
    found = measure_detection(examples)
    assert found is not None and json.loads(json.dumps(found)) == found
    assert found["clean_rejected"] == pytest.approx(2 / 7)
    assert (found["attacked"], found["attacked_rejected"]) == (4, 1 / 4)
    # Behind the detector the network is right about image 1, whose largest class is its own.
    assert (found["fooling"], found["fooling_rejected"]) == (2, 0)
    clean = [suspicion(grey) for grey in GREYS]
    after = [suspicion(grey) for grey in (10, 30, 20, 10)]
    assert found["attacked_roc_auc"] == pytest.approx(area(clean, after))
    assert found["fooling_roc_auc"] == pytest.approx(area(clean, [suspicion(10)] * 2))


def area(negative: list[float], positive: list[float]) -> float:
    """The share of pairs in the right order, equal ones half."""
    pairs = [(b > a) + 0.5 * (b == a) for a, b in product(negative, positive)]
    return float(np.mean(pairs))


def test_without_attacked_images_there_is_no_area() -> None:
    found = measure_detection(outcome([30, 10], [0, 0], {}))
    assert found == {
        "clean_rejected": 0.5, "attacked": 0, "attacked_rejected": None, "attacked_roc_auc": None,
        "fooling": 0, "fooling_rejected": None, "fooling_roc_auc": None,
    }  # fmt: skip


def test_victims_that_reject_nothing_have_no_detection_and_rank_apart(digits: Dataset) -> None:
    oracle = Oracle(Lazy(), EVERYTHING, CLASSES)
    plain = evaluate(oracle, Repaint({0: 10}), split([0, 20], [0, 2]), batch_size=2).examples
    assert measure_detection(plain) is None
    assert np.array(measure(plain, CLASSES)["clean"]["confusion"]).shape == (CLASSES, CLASSES)
    settings = {"awareness": "adaptive"}
    key = comparability(settings, digits, EVERYTHING)
    assert key == comparability(settings, digits, EVERYTHING, rejects=False)
    assert key != comparability(settings, digits, EVERYTHING, rejects=True)


def test_examples_come_back_from_their_file(tmp_path) -> None:
    store, examples = Store(tmp_path), outcome(GREYS, LABELS, PAINT)
    store.add({"version": RECORD_VERSION, "run_id": "rejecting", "config": {}}, examples)
    read = store.examples("rejecting")
    for part in fields(PerExample):
        assert np.array_equal(getattr(read, part.name), getattr(examples, part.name)), part.name


def test_the_audit_counts_as_the_evaluation_does() -> None:
    data = split([0, 10, 20, 30], [0, 1, 2, 0])
    oracle = Oracle(Table(), EVERYTHING, CLASSES)
    trials = Trials(oracle, data, judging=Judging(), batch_size=2, sample=4)
    assert trials.right.tolist() == [0, 1, 2]
    # Rejected, rejected, and accepted as another class.
    left = trials.run("repaint", Repaint({0: 30, 10: 30, 20: 0}), EVERYTHING)
    assert left.flatten().tolist() == [True, True, False, False]
    painted = torch.tensor([30, 0, 10]).view(-1, 1, 1, 1) / 255
    confirmed = trials.confirmed(painted.expand(3, 1, 2, 2), torch.tensor([0, 1, 2]))
    assert confirmed.tolist() == [False, True, True]

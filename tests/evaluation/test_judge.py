"""The judge catches attacks that cheat, crash, or leave the victim changed."""

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_local.attacks import PGD, Attack
from robustbench_local.data import Split
from robustbench_local.errors import UserError
from robustbench_local.evaluation import Judging, evaluate, judge
from robustbench_local.oracle import Oracle
from robustbench_local.threat import BudgetError, ThreatModel

LINF = ThreatModel(norm="linf", epsilon=0.1)
PIXELS = 16


class Sum(nn.Module):
    """Class 1 where the mean pixel is above one half; everything about it is known by hand."""

    def forward(self, x):
        margin = x.flatten(1).mean(1) - 0.5
        return torch.stack([-margin, margin], 1)


class Noisy(Sum):
    """The same, with a coin from torch's global generator: wrong with probability 0.3."""

    def forward(self, x):
        flip = torch.rand(len(x), 1, device=x.device) < 0.3
        logits = super().forward(x)
        return torch.where(flip, logits.flip(1), logits)


def make_split(n=40, generator_seed=0):
    """Mean pixels evenly from 0.2 to 0.8, labelled by `Sum`, except that every tenth is wrong."""
    means = torch.linspace(0.2, 0.8, n)
    images = (means.view(-1, 1, 1, 1) * 255).round().to(torch.uint8).expand(n, 1, 4, 4).contiguous()
    labels = (means > 0.5).long()
    labels[::10] = 1 - labels[::10]
    return Split(images, labels, torch.arange(100, 100 + n))


class Returning(Attack):
    """Returns whatever it is told to."""

    needs = "labels"
    norms = frozenset({"linf", "l2"})

    def __init__(self, change):
        super().__init__()
        object.__setattr__(self, "change", change)

    def run(self, model, x, y, threat):
        return self.change(model, x)


def evaluated(attack, *, victim=None, threat=LINF, batch_size=7, split=None, **keywords):
    oracle = Oracle(victim or Sum(), threat, 2)
    return evaluate(oracle, attack, split or make_split(), batch_size=batch_size, **keywords)


def test_clean_errors_count_and_are_not_attacked():
    split = make_split()
    threat = ThreatModel(norm="linf", epsilon=0.097)
    outcomes = evaluated(PGD(steps=5, step_size=0.5), split=split, threat=threat)
    examples = outcomes.examples
    pixels = split.pixels(slice(None)).flatten(1).mean(1)
    right = (pixels > 0.5).long() == split.labels
    # Every pixel moves by epsilon: exactly the means closer than that to one half are broken.
    survives = right & ((pixels - 0.5).abs() > 0.097)
    assert examples.clean_correct.tolist() == right.double().tolist()
    assert examples.robust_correct.tolist() == survives.double().tolist()
    assert examples.attacked.tolist() == right.tolist()
    assert not examples.size[~right.numpy()].any()
    assert examples.indices.tolist() == list(range(100, 140))


def test_passes_are_counted_by_hand():
    threat = ThreatModel(norm="linf", epsilon=0.001)
    split = make_split()
    attack = PGD(steps=3, step_size=0.5)
    outcomes = evaluated(attack, threat=threat, split=split)
    assert outcomes.examples.robust_correct.sum() == outcomes.examples.attacked.sum()
    assert outcomes.forward_passes == 4  # one a step, and the last iterate
    assert outcomes.backward_passes == 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda model, x: x + 0.2, "exceeds epsilon"),
        (lambda model, x: x + 0.1 + 3e-6, "exceeds epsilon"),
        (lambda model, x: (x - 0.09) * torch.nan, "NaN"),
        (lambda model, x: x[:, :, :2], "shape"),
    ],
)
def test_fouls_end_the_run_and_are_never_robust(change, complaint):
    with pytest.raises(BudgetError, match=complaint):
        evaluated(Returning(change))


def test_the_box_is_checked_too():
    bright = Split(
        torch.full((3, 1, 4, 4), 255, dtype=torch.uint8), torch.ones(3).long(), torch.arange(3)
    )
    with pytest.raises(BudgetError, match=r"image 0: pixels .* leave \[0, 1\]"):
        evaluated(Returning(lambda model, x: x + 0.05), split=bright)


def test_a_foul_names_the_position_in_the_test_set():
    def spoil_the_last(model, x):
        x = x.clone()
        x[-1] += 0.5
        return x.clamp(0, 1)

    split = make_split()
    # Batches of 40: the last correct image is number 39 of the split, 139 of the test set.
    with pytest.raises(BudgetError, match="image 139: "):
        evaluated(Returning(spoil_the_last), split=split, batch_size=40)


def test_rounding_is_within_the_tolerance():
    outcomes = evaluated(Returning(lambda model, x: (x + 0.1 + 5e-7).clamp(0, 1)))
    assert outcomes.examples.size.max() == pytest.approx(0.1, abs=1e-6)


def test_a_crash_is_not_robustness():
    def crash(model, x):
        raise ZeroDivisionError("the attack's own fault")

    with pytest.raises(ZeroDivisionError):
        evaluated(Returning(crash))


def test_an_attack_that_flips_the_mode_is_undone():
    class Moody(Sum):
        """Right in eval mode only."""

        def forward(self, x):
            logits = super().forward(x)
            return -logits if self.training else logits

    victim = Moody().eval()

    def disturb(model, x):
        model.train()
        for module in model.modules():
            module.requires_grad_(True)
        return x

    outcomes = evaluated(Returning(disturb), victim=victim)
    assert not victim.training
    assert outcomes.examples.robust_correct.sum() == outcomes.examples.clean_correct.sum() > 0


def test_a_randomised_victim_is_judged_on_fresh_draws():
    split = make_split(400)
    outcomes = evaluated(
        Returning(lambda model, x: x),
        victim=Noisy(),
        split=split,
        batch_size=100,
        judging=Judging(draws=50, seed=3),
    )
    # Right with 0.7 where the label agrees with the mean, with 0.3 for every tenth, whose label is
    # wrong. An attack that changes nothing lowers nothing, although the two looks draw afresh.
    examples = outcomes.examples
    good = (split.pixels(slice(None)).flatten(1).mean(1) > 0.5).long() == split.labels
    assert examples.clean_correct[good].mean() == pytest.approx(0.7, abs=0.02)
    assert examples.clean_correct[~good].mean() == pytest.approx(0.3, abs=0.05)
    assert examples.robust_correct[good].mean() == pytest.approx(0.7, abs=0.02)
    assert examples.robust_correct[~good].mean() == pytest.approx(0.3, abs=0.05)
    assert not np.array_equal(examples.clean_draws, examples.robust_draws)
    assert examples.clean_draws.shape == examples.robust_draws.shape == (400, 50)
    assert examples.clean_draws.mean(1).tolist() == examples.clean_correct.tolist()
    assert examples.robust_draws.mean(1).tolist() == examples.robust_correct.tolist()


def test_what_a_random_victim_mostly_gets_wrong_is_attacked_too():
    """Images of mean 0.55 are right in three draws of ten here, and at 0.45 in none."""

    class Torn(Sum):
        def forward(self, x):
            lucky = torch.rand(len(x)) < 0.3
            wrong = ~lucky | (x.flatten(1).mean(1) < 0.5)
            return torch.stack([wrong.float(), 1 - wrong.float()], 1)

    images = torch.full((50, 1, 4, 4), 140, dtype=torch.uint8)
    split = Split(images, torch.ones(50).long(), torch.arange(50))
    judging = Judging(draws=40, seed=1)
    attack = Returning(lambda model, x: x - 0.1)
    broken = evaluated(attack, victim=Torn(), split=split, judging=judging).examples
    assert (broken.clean_correct < 0.5).sum() >= 48
    assert broken.attacked.all() and not broken.robust_correct.any()


def test_a_deterministic_victim_has_no_draws_to_store():
    examples = evaluated(PGD(steps=2)).examples
    assert examples.clean_draws.shape == examples.robust_draws.shape == (40, 0)


def test_the_judge_uses_the_same_draws_again():
    x = torch.full((20, 1, 4, 4), 0.6)
    y = torch.ones(20).long()
    first, second, other = (
        judge(Noisy(), x, x, y, LINF, num_classes=2, draws=9, seed=seed).correct
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_precision_and_random_state_are_left_alone():
    torch.set_float32_matmul_precision("medium")
    state = torch.random.get_rng_state()
    seen = []

    class Looking(Sum):
        def forward(self, x):
            seen.append((torch.get_float32_matmul_precision(), torch.is_grad_enabled()))
            return super().forward(x)

    x = torch.full((2, 1, 4, 4), 0.6)
    try:
        judge(Looking(), x, x, torch.ones(2).long(), LINF, num_classes=2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False)]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("x", "y", "complaint"),
    [
        (torch.full((1, 1, 4, 4), 1.5), torch.zeros(1).long(), r"expected float32 in \[0, 1\]"),
        (torch.full((1, 1, 4, 4), -0.1), torch.zeros(1).long(), r"expected float32 in \[0, 1\]"),
        (
            torch.full((1, 1, 4, 4), torch.nan),
            torch.zeros(1).long(),
            r"expected float32 in \[0, 1\]",
        ),
        (torch.full((1, 1, 4, 4), 0.5), torch.full((1,), 2), "expected 0 to 1"),
        (torch.full((1, 1, 4, 4), 0.5), torch.full((1,), -1), "expected 0 to 1"),
    ],
)
def test_bad_images_and_labels_are_refused(x, y, complaint):
    with pytest.raises(UserError, match=complaint):
        judge(Sum(), x, x, y, LINF, num_classes=2)


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (lambda x: torch.zeros(len(x), 3), r"expected logits of shape \(1, 2\)"),
        (lambda x: torch.zeros(len(x)), r"expected logits of shape \(1, 2\)"),
        (lambda x: "cat", "returned str"),
        (lambda x: torch.full((len(x), 2), torch.nan), "NaN or infinity for image 0"),
        (lambda x: torch.full((len(x), 2), torch.inf), "NaN or infinity for image 0"),
    ],
)
def test_bad_models_are_refused(output, complaint):
    class Bad(nn.Module):
        def forward(self, x):
            return output(x)

    x = torch.full((1, 1, 4, 4), 0.5)
    with pytest.raises(UserError, match=complaint):
        judge(Bad(), x, x, torch.zeros(1).long(), LINF, num_classes=2)


def test_out_of_memory_halves_the_batch_and_changes_no_number():
    class Tight(Sum):
        """Memory for eight images."""

        def forward(self, x):
            if len(x) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    said = []
    tight = evaluated(PGD(steps=5), victim=Tight(), batch_size=32, say=said.append)
    whole = evaluated(PGD(steps=5), batch_size=32)
    assert tight.batch_size == 8
    assert said == [
        "out of memory: the evaluation goes on with batches of 16 images",
        "out of memory: the evaluation goes on with batches of 8 images",
    ]
    assert tight.examples.robust_correct.tolist() == whole.examples.robust_correct.tolist()
    assert tight.examples.size.tolist() == whole.examples.size.tolist()
    assert tight.forward_passes == whole.forward_passes

    class Full(Sum):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="one image alone does not fit"):
        evaluated(PGD(steps=5), victim=Full(), batch_size=4)


def test_a_batch_without_a_correct_image_is_not_attacked():
    class Strict(Sum):
        """Like `x.view(len(x), -1)`, which an empty batch breaks."""

        def forward(self, x):
            assert len(x) > 0
            return super().forward(x)

    split = make_split()
    wrong = Split(split.images, 1 - split.labels, split.indices)
    examples = evaluated(PGD(steps=2), victim=Strict(), split=wrong, batch_size=1).examples
    assert examples.clean_correct.sum() == 4  # the ones that were labelled wrongly before
    assert not examples.size[~examples.attacked].any()


def test_progress_reports_the_running_accuracy():
    calls = []
    outcomes = evaluated(PGD(steps=3), progress=lambda done, robust: calls.append((done, robust)))
    assert sum(done for done, _ in calls) == 40
    assert calls[-1][1] == pytest.approx(outcomes.examples.robust_correct.mean())

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from robustbench_local import randomness
from robustbench_local.randomness import Draws, derive_seed

SIZE = 20_000


def image(seed: int = 0, count: int = 1, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    """Real images are multiples of 1/255 with many equal pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 356, (count, *shape), generator=generator).clamp_(0, 255) / 255


def likeness(first: Tensor, second: Tensor) -> list[str]:
    """What two streams have in common: shared values, correlation, also shifted; else empty."""
    found = ["equal"] if torch.equal(first, second) else []
    for lag in (-3, -2, -1, 0, 1, 2, 3, 7, 64):
        shifted = second.roll(lag)
        correlation = np.corrcoef(first.numpy(), shifted.numpy())[0, 1]
        # Five standard deviations of the correlation of independent streams.
        if not abs(correlation) < 5 / len(first) ** 0.5:
            found.append(f"correlation {correlation:.3g} at lag {lag}")
        shared = int((first == shifted).sum())
        if shared > 5:
            found.append(f"{shared} values shared at lag {lag}")
    return found


def test_likeness_is_seen() -> None:
    stream = Draws(image(), 0).uniform(SIZE)[0]
    assert "equal" in likeness(stream, stream)
    assert likeness(stream, stream.roll(-7))
    assert likeness(stream, stream + 0.1 * Draws(image(), 1).uniform(SIZE)[0])


@pytest.mark.parametrize("seed", [0, 1, 2, 12345, 2**31, 2**62 + 1])
def test_uniform_draws_are_uniform(seed: int) -> None:
    draws = Draws(image(seed), seed)
    for _ in range(5):
        values = draws.uniform(SIZE)[0].numpy()
        assert stats.kstest(values, "uniform").pvalue > 1e-4
        assert values.min() > 0
        assert values.max() < 1


def test_uniform_draws_across_examples_are_uniform() -> None:
    """One pixel of many images: what a random start draws for the same place."""
    x = image(3, 4000)
    draws = Draws(x, 7)
    first, second = draws.uniform(50), draws.uniform(50)
    pvalues = [stats.kstest(first[:, place].numpy(), "uniform").pvalue for place in range(50)]
    pvalues += [stats.kstest(second[:, place].numpy(), "uniform").pvalue for place in range(50)]
    # The smallest of 100 p-values of true hypotheses; and they are spread evenly themselves.
    assert min(pvalues) > 1e-4
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


def test_a_blank_image_draws_uniformly() -> None:
    for value in (0.0, 1.0):
        values = Draws(torch.full((1, 1, 28, 28), value), 0).uniform(SIZE)[0].numpy()
        assert stats.kstest(values, "uniform").pvalue > 1e-4


def test_every_bit_is_fair_and_independent_of_the_others() -> None:
    bits = Draws(image(1), 3)._bits(SIZE)[0].numpy().astype(np.uint32)
    planes = [(bits >> place) & 1 for place in range(32)]
    ones = np.array([plane.sum() for plane in planes])
    chi_square = float((((ones - SIZE / 2) ** 2) / (SIZE / 4)).sum())
    assert 1e-4 < stats.chi2.sf(chi_square, 32) < 1 - 1e-4
    worst = max(
        abs(np.corrcoef(planes[a], planes[b])[0, 1])
        for a, b in itertools.combinations(range(32), 2)
    )
    assert worst < 5 / SIZE**0.5
    # The same bit of neighbouring draws.
    assert all(abs(np.corrcoef(plane[1:], plane[:-1])[0, 1]) < 5 / SIZE**0.5 for plane in planes)


def test_pairs_of_draws_fill_the_square() -> None:
    values = Draws(image(1), 3).uniform(2 * SIZE)[0].numpy().reshape(-1, 2)
    counts = np.histogram2d(values[:, 0], values[:, 1], bins=16, range=[[0, 1]] * 2)[0]
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_rounds_are_unrelated() -> None:
    draws = Draws(image(), 0)
    rounds = [draws.uniform(SIZE)[0] for _ in range(4)]
    for first, second in itertools.combinations(rounds, 2):
        assert likeness(first, second) == []


def test_many_rounds_never_repeat() -> None:
    draws = Draws(image(), 0)
    starts = torch.stack([draws.uniform(8)[0] for _ in range(5000)])
    assert len(starts.unique(dim=0)) == 5000
    assert stats.kstest(starts[:, 0].numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("other", [1, 2, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1])
def test_neighbouring_seeds_are_unrelated(other: int) -> None:
    assert (
        likeness(Draws(image(), 0).uniform(SIZE)[0], Draws(image(), other).uniform(SIZE)[0]) == []
    )


def test_seeds_across_are_uniform() -> None:
    """The first draw of one image under 2,000 consecutive seeds."""
    values = [float(Draws(image(), seed).uniform(1)) for seed in range(2000)]
    assert len(set(values)) > 1990
    assert stats.kstest(values, "uniform").pvalue > 1e-4


def test_examples_are_unrelated() -> None:
    values = Draws(image(0, 6), 0).uniform(SIZE)
    for first, second in itertools.combinations(values, 2):
        assert likeness(first, second) == []


@pytest.mark.parametrize("place", [0, 1, 31, 63])
def test_one_grey_level_in_one_pixel_changes_everything(place: int) -> None:
    x = image().clamp(0.1, 0.9)
    near = x.clone()
    near.view(-1)[place] += 1 / 255
    assert likeness(Draws(x, 0).uniform(SIZE)[0], Draws(near, 0).uniform(SIZE)[0]) == []


def test_all_images_one_grey_level_away_get_their_own_stream() -> None:
    x = image().clamp(0.1, 0.9).expand(64, 1, 8, 8).clone()
    x.view(64, 64).diagonal().add_(1 / 255)
    values = Draws(x, 0).uniform(200)
    correlation = np.corrcoef(values.numpy())
    assert np.abs(correlation - np.eye(64)).max() < 6 / 200**0.5
    assert stats.kstest(values[:, 0].numpy(), "uniform").pvalue > 1e-4


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 63), min_size=2, max_size=2, unique=True))
def test_swapping_two_pixels_changes_the_stream(places: list[int]) -> None:
    x = (torch.arange(64) / 255).view(1, 1, 8, 8)
    swapped = x.clone()
    swapped.view(-1)[places] = x.view(-1)[places[::-1]]
    assert likeness(Draws(x, 0).uniform(2000)[0], Draws(swapped, 0).uniform(2000)[0]) == []


def test_the_place_of_a_lone_pixel_counts() -> None:
    """Nearly blank images are the least random input there is."""
    x = torch.zeros(256, 1, 8, 8)
    x.view(4, 64, 64).diagonal(dim1=1, dim2=2)[:] = torch.tensor([1, 2, 254, 255])[:, None] / 255
    values = Draws(x, 0).uniform(100)
    assert len(values.unique(dim=0)) == 256
    assert np.abs(np.corrcoef(values.numpy()) - np.eye(256)).max() < 0.6
    assert stats.kstest(values[:, 0].numpy(), "uniform").pvalue > 1e-4


def test_equal_images_share_a_stream_whatever_the_batch() -> None:
    x = image(0, 5)
    whole = Draws(x, 9).uniform(100)
    for row in range(5):
        assert torch.equal(Draws(x[row : row + 1], 9).uniform(100)[0], whole[row])
    assert torch.equal(Draws(x.double(), 9).uniform(100), whole)
    layout = x.expand(5, 3, 8, 8).contiguous()
    expected = Draws(layout, 9).uniform(100)
    last = layout.contiguous(memory_format=torch.channels_last)
    assert torch.equal(Draws(last, 9).uniform(100), expected)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_subset_goes_on_where_the_whole_stands(rows: list[int], before: int, mask: bool) -> None:
    whole = Draws(image(0, 10), 5)
    for _ in range(before):
        whole.uniform(13)
    index = torch.zeros(10, dtype=torch.bool).scatter(0, torch.tensor(rows), True)
    chosen = index if mask else torch.tensor(rows)
    part = whole[chosen]
    assert torch.equal(part.uniform(30), whole.uniform(30)[chosen])
    assert torch.equal(part.normal(30), whole.normal(30)[chosen])


def test_normal_draws_are_normal() -> None:
    values = Draws(image(), 4).normal(200_000)[0].double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    deviation = 1 / len(values) ** 0.5
    assert abs(values.mean()) < 5 * deviation
    assert abs(values.var() - 1) < 5 * 2**0.5 * deviation
    assert abs((values**3).mean()) < 5 * 15**0.5 * deviation
    assert abs((values**4).mean() - 3) < 5 * 96**0.5 * deviation
    assert 4 < np.abs(values).max() < 6
    assert np.isfinite(values).all()


def test_draws_touch_no_global_generator() -> None:
    before = torch.get_rng_state()
    Draws(image(), 0).normal(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_are_the_same_on_every_machine() -> None:
    """Frozen values: changing them silently would change every published number."""
    values = Draws((torch.arange(12) / 255).view(1, 3, 2, 2), derive_seed(0, "pgd", 0)).uniform(4)
    assert (values[0] * 2**23 - 0.5).tolist() == [4965163, 5114073, 5365191, 2153764]


def lowbias32(bits: int) -> int:
    """The published hash in unsigned arithmetic, which torch does not have."""
    bits ^= bits >> 16
    bits = bits * 0x7FEB352D & 0xFFFFFFFF
    bits ^= bits >> 15
    bits = bits * 0x846CA68B & 0xFFFFFFFF
    return bits ^ bits >> 16


def test_the_hash_is_the_published_one() -> None:
    """Signed overflow and shifts must come out as unsigned ones, on every backend."""
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=torch.Generator().manual_seed(0))
    mixed = randomness._mix(bits.to(torch.int32)).tolist()
    expected = [lowbias32(value & 0xFFFFFFFF) for value in bits.tolist()]
    assert [value & 0xFFFFFFFF for value in mixed] == expected


def test_derived_seeds_depend_on_every_part() -> None:
    parts = [(0,), (1,), (0, 0), (0, "pgd"), (0, "pgd", 0), (0, "pgd", 1), (0, "noise"), ("0 pgd",)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "pgd", 0) == derive_seed("0", "pgd", "0")
    assert derive_seed("ab", "c") != derive_seed("a", "bc")

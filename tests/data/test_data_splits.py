"""Splits, fingerprints and pixels, whatever the source."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from robustbench_local.data import Dataset, Raw, Source, Split, load
from robustbench_local.data.splits import apportion, choose_test, split_validation
from robustbench_local.errors import UserError

COUNTS = (100, 61, 39)  # training images per class
TEST_COUNTS = (50, 30, 20)


class Made(Source):
    """Images made on the spot; `change` edits them before they are read."""

    change = staticmethod(lambda x, y: None)

    def read(self, data_dir: Path, cache_dir: Path) -> Raw:
        generator = torch.Generator().manual_seed(7)

        def part(counts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            y = y[torch.randperm(len(y), generator=generator)]
            x = torch.randint(256, (len(y), 1, 4, 4), generator=generator, dtype=torch.uint8)
            return x, y

        (x_train, y_train), (x_test, y_test) = part(COUNTS), part(TEST_COUNTS)
        self.change(x_train, y_train)
        return Raw("made", "files", x_train, y_train, x_test, y_test, ("a", "b", "c"))


def made(device: str = "cpu", change=None, **settings) -> Dataset:
    source = Made(**settings)
    if change is not None:
        object.__setattr__(source, "change", change)
    return load(source, Path("data"), Path("cache"), device)


def test_validation_is_stratified_disjoint_and_covers_the_training_set():
    data, raw = made(validation_fraction=0.1), Made().read(Path(), Path())
    assert torch.bincount(data.validation.labels).tolist() == [10, 6, 4]
    everything = torch.cat([data.train.indices, data.validation.indices])
    assert everything.sort().values.tolist() == list(range(sum(COUNTS)))
    for split in (data.train, data.validation):
        assert torch.equal(split.images, raw.x_train[split.indices])
        assert torch.equal(split.labels, raw.y_train[split.indices])
    assert torch.equal(data.test.images, raw.x_test)
    assert (data.num_classes, data.input_shape, data.test_total) == (3, (1, 4, 4), 100)


def test_every_class_gets_a_validation_image_however_small_the_fraction():
    data = made(validation_fraction=0.001)
    assert torch.bincount(data.validation.labels).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("size", "expected"), [(10, [5, 3, 2]), (3, [1, 1, 1]), (99, [49, 30, 20])]
)
def test_test_subset_is_proportional_by_largest_remainder(size, expected):
    # By hand: 3 images are 1.5, 0.9, 0.6 -> 1 + one each for the remainders 0.9 and 0.6;
    # 99 images are 49.5, 29.7, 19.8.
    data = made(test_size=size)
    assert torch.bincount(data.test.labels, minlength=3).tolist() == expected
    assert len(set(data.test.indices.tolist())) == size
    assert data.test_total == 100
    assert any(f"{size} of the 100 test images" in note for note in data.notes)


def test_apportion_gives_every_place_and_no_class_more_than_it_has():
    generator = np.random.default_rng(0)
    for _ in range(200):
        counts = generator.integers(0, 50, size=7) + np.eye(7, dtype=np.int64)[0]
        total = int(generator.integers(0, counts.sum() + 1))
        places = apportion(counts, total)
        assert places.sum() == total
        assert (places <= counts).all()
        assert (abs(places - counts * total / counts.sum()) < 1).all()


def test_a_subset_of_full_size_is_the_full_test_set():
    full, asked = made(), made(test_size=100)
    assert asked.test_fingerprint == full.test_fingerprint
    assert asked.notes == full.notes == ()


def test_subsets_are_fixed_by_the_seed():
    assert made(test_size=20).test_fingerprint == made(test_size=20).test_fingerprint
    assert made(test_size=20).test_fingerprint != made(test_size=20, split_seed=1).test_fingerprint


def test_splits_stay_what_they_were():
    # Recorded once: records of earlier runs are comparable only as long as this holds.
    labels = torch.arange(100) % 3
    assert choose_test(labels, 6, classes=3, seed=0).tolist() == [23, 46, 67, 75, 89, 99]
    assert split_validation(labels, 0.06, seed=0)[1].tolist() == [7, 10, 18, 35, 41, 60]


def _one_pixel(x, y):
    x[3, 0, 1, 1] ^= 1


def _one_label(x, y):
    y[3] = (y[3] + 1) % 3


@pytest.mark.parametrize(
    "other",
    [{"change": _one_pixel}, {"change": _one_label}, {"split_seed": 1}],
    ids=["pixel", "label", "split"],
)
def test_fingerprint_changes_with_pixels_labels_and_split(other):
    assert made(**other).fingerprint != made().fingerprint


def test_fingerprint_ignores_test_size_and_device():
    data = made()
    assert made(test_size=10).fingerprint == data.fingerprint
    elsewhere = made(device="meta")
    assert elsewhere.train.images.device.type == "meta"
    assert elsewhere.train.indices.device.type == "cpu"
    assert elsewhere.fingerprint == data.fingerprint


def test_pixels_are_exact_multiples_of_one_255th():
    every = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    split = Split(every, torch.zeros(256, dtype=torch.int64), torch.arange(256))
    expected = (np.arange(256) / 255).astype(np.float32)  # correctly rounded from float64
    pixels = split.pixels(slice(None))
    assert pixels.dtype == torch.float32
    assert np.array_equal(pixels.flatten().numpy(), expected)
    assert np.array_equal(split.pixels(torch.tensor([255, 3])).flatten(), expected[[255, 3]])
    assert every[7].item() == 7  # the bytes are not touched


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"test_size": 101}, "more than the 100 test images"),
        ({"test_size": 0}, "test_size=0"),
        ({"test_size": -5}, "test_size=-5"),
        ({"test_size": 2}, "3 classes"),
        ({"test_size": 2.5}, "whole number"),
        ({"validation_fraction": 0}, "validation_fraction=0"),
        ({"validation_fraction": 0.6}, "up to 0.5"),
        ({"validation_fraction": "much"}, "'much'"),
        ({"split_seed": -1}, "split_seed=-1"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        made(**settings)


def test_a_class_with_one_training_image_is_refused():
    def lonely(x, y):
        y[y == 2] = 1
        y[0] = 2

    with pytest.raises(UserError, match="class 2 has a single training image"):
        made(change=lonely)


def test_a_class_without_training_images_is_noted():
    def gap(x, y):
        y[y == 1] = 0

    assert "1 of the 3 classes" in made(change=gap).notes[0]


CONF = Path(__file__).parents[2] / "conf" / "dataset"


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_dataset_config_makes_a_source_with_documented_defaults(file):
    source = instantiate(OmegaConf.load(file))
    assert isinstance(source, Source)
    assert source == type(source)()  # the YAML and the class agree on every default

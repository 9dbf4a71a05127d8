"""Arrays from a .npz file: both layouts, and every way a file can be wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch

from robustbench_local.data import Dataset, Npz, load
from robustbench_local.errors import UserError


def arrays(shape=(8, 8, 3)) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (40, *shape), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": generator.integers(0, 256, (12, *shape), dtype=np.uint8),
        "y_test": np.arange(12) % 4,
    }


def saved(folder: Path, **content: np.ndarray) -> Path:
    path = folder / "birds.v2.npz"
    np.savez_compressed(path, **content)
    return path


def read(path: Path, **settings) -> Dataset:
    return load(Npz(path=str(path), **settings), path.parent, path.parent, "cpu")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message  # one sentence
    return message


def test_channels_last_and_channels_first_give_the_same_dataset(tmp_path):
    content = arrays()
    last = read(saved(tmp_path, **content))
    for key in ("x_train", "x_test"):
        content[key] = np.moveaxis(content[key], 3, 1)
    first = read(saved(tmp_path, **content))
    assert first.input_shape == last.input_shape == (3, 8, 8)
    assert first.fingerprint == last.fingerprint
    assert torch.equal(first.test.images, last.test.images)
    assert last.test.images[5, 2, 6, 7].item() == arrays()["x_test"][5, 6, 7, 2]
    assert last.name == "birds.v2"


def test_grey_images_need_no_channel_axis(tmp_path):
    content = arrays(shape=(9, 5))
    grey = read(saved(tmp_path, **content), name="grey")
    assert (grey.name, grey.input_shape) == ("grey", (1, 9, 5))
    for key in ("x_train", "x_test"):
        content[key] = content[key][..., None]
    assert read(saved(tmp_path, **content)).fingerprint == grey.fingerprint


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint64"])
def test_labels_of_any_integer_type_and_as_a_column(tmp_path, dtype):
    content = arrays()
    plain = read(saved(tmp_path, **content))
    for key in ("y_train", "y_test"):
        content[key] = content[key].astype(dtype)[:, None]
    other = read(saved(tmp_path, **content))
    assert other.test.labels.dtype == torch.int64
    assert other.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (lambda x: x / 255, ["float64", "from 0 to 1", '(x * 255).round().astype("uint8")']),
        (lambda x: x / 127.5 - 1, ["from -1 to 1", "outside [0, 1]"]),
        (lambda x: np.where(x == x.max(), np.nan, x / 255), ["NaN"]),
        (lambda x: x.astype(np.int64), ["int64", 'astype("uint8")']),
        (lambda x: x > 99, ["bool"]),
        (lambda x: x.astype(str), ["dtype <U3"]),
    ],
)
def test_other_pixel_types_are_refused_with_their_range(tmp_path, scale, says):
    content = arrays()
    content["x_train"] = scale(content["x_train"])
    message = refusal(saved(tmp_path, **content))
    assert all(part in message for part in ["x_train", *says])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("x_train", np.zeros((40, 3, 3, 3), np.uint8), "both axes 1 and 3"),
        ("x_train", np.zeros((40, 8, 8, 4), np.uint8), "neither axis 1 nor axis 3"),
        ("x_train", np.zeros((40, 192), np.uint8), "shape (40, 192)"),
        ("x_train", np.zeros((0, 8, 8, 3), np.uint8), "non-empty"),
        ("x_test", np.zeros((12, 9, 9, 3), np.uint8), "one shape"),
        ("y_train", np.arange(39) % 4, "39 labels for 40 images"),
        ("y_train", (np.arange(40) % 4).astype(float), "float64"),
        ("y_train", np.eye(4, dtype=int)[np.arange(40) % 4], "argmax(1)"),
        ("y_train", np.arange(40) % 4 - 1, "y_train[0] is -1"),
        ("y_train", np.arange(40) * 10**9, "y_train[1] is 1000000000"),
        ("y_train", np.zeros(40, int), "y_test[1] is 1"),
        ("y_test", np.arange(12), "y_test[4] is 4"),
        ("y_train", np.array([{}] * 40), "objects"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, key, value, says):
    assert says in refusal(saved(tmp_path, **{**arrays(), key: value}))


def test_a_single_class_is_refused(tmp_path):
    content = arrays()
    content["y_train"], content["y_test"] = np.zeros(40, int), np.zeros(12, int)
    assert "at least 2" in refusal(saved(tmp_path, **content))


def test_missing_arrays_are_named(tmp_path):
    content = arrays()
    del content["y_test"]
    assert "has no y_test" in refusal(saved(tmp_path, **content))


def test_files_that_are_no_whole_npz_are_refused(tmp_path):
    path = saved(tmp_path, **arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "can't be read" in refusal(path)
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    assert "can't be read" in refusal(path)
    path.write_bytes(b"not a zip file")
    assert "can't be read" in refusal(path)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    assert "single array" in refusal(path.with_suffix(".npy"))
    assert "is not there" in refusal(tmp_path / "missing.npz")
    assert "is a folder" in refusal(tmp_path)


def test_no_path_says_what_to_type(tmp_path):
    with pytest.raises(UserError, match=r"type dataset\.path=FILE\.npz"):
        load(Npz(), tmp_path, tmp_path, "cpu")

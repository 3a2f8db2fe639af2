"""Token shards: what is written is read, by webdataset too, and what is not whole is refused."""

import contextlib
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpar_core.data import remote
from dpar_core.data.remote import Folder
from dpar_core.data.shards import (
    INDEX,
    SUMMARY,
    OpenFiles,
    TokenMeta,
    TokenSample,
    TokenShards,
    scan_shard,
    write_index,
    write_shard,
)

GRID, VIEWS, CODES = 4, 3, 16
META = TokenMeta(GRID, CODES, "test", VIEWS, 64, ("cat", "dog"), "tokenizer0000000", "manifest00000000")


def samples(split: str, count: int, *, seed: int = 0) -> list[TokenSample]:
    random = np.random.default_rng([seed, len(split)])
    tokens = random.integers(0, 2**16, (count, VIEWS, GRID**2)).astype(np.uint16)
    return [TokenSample(f"{split}-{n:04d}", n % 2, tokens[n], {"n": "x" * (700 * (n % 3))}) for n in range(count)]


def write_folder(folder: Path, *, sizes: dict[str, list[int]] | None = None, scan: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shards, contents = [], []
    for split, counts in (sizes or {"train": [5, 4], "validation": [3]}).items():
        everything = samples(split, sum(counts))
        for number, count in enumerate(counts):
            name = f"{split}-{number:06d}.tar"
            part, everything = everything[:count], everything[count:]
            contents.append(write_shard(folder / name, part))
            shards.append((name, split))
    write_index(folder, META, shards, contents=None if scan else contents)
    return folder


def test_an_index_that_was_read_does_not_change_with_its_file(tmp_path):
    shards = TokenShards(write_folder(tmp_path), "train")
    labels = shards.labels.tolist()
    with open(tmp_path / INDEX, "r+b") as stream:
        stream.write(bytes((tmp_path / INDEX).stat().st_size))
    assert shards.labels.tolist() == labels == [0, 1, 0, 1, 0, 1, 0, 1, 0] and shards.find("train-0003") == 3


def test_every_view_of_every_sample_is_read_as_written(tmp_path):
    write_folder(tmp_path)
    for split, count in (("train", 9), ("validation", 3)):
        shards = TokenShards(tmp_path, split)
        assert len(shards) == count and shards.meta == META
        for index, sample in enumerate(samples(split, count)):
            assert (shards.key(index), shards.labels[index]) == (sample.key, sample.label)
            assert np.array_equal(shards.all_views(index), sample.tokens)
            assert shards.find(sample.key) == index
        assert shards.find("nobody") is None


@settings(max_examples=50)
@given(picks=st.lists(st.tuples(st.integers(0, 8), st.integers(0, VIEWS - 1)), max_size=12))
def test_random_access_equals_walking_the_tar(folder_of_two_shards, picks):
    shards = TokenShards(folder_of_two_shards, "train")
    walked = []
    for name, _ in shards.shards():
        with tarfile.open(folder_of_two_shards / name) as tar:
            walked += [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".npy")]
    indices, views = np.array([p[0] for p in picks], int), np.array([p[1] for p in picks], int)
    found = shards.tokens(indices, views)
    assert found.shape == (len(picks), GRID**2) and found.dtype == np.uint16
    for row, index, view in zip(found, indices, views):
        assert np.array_equal(row, walked[index][view])


@pytest.fixture(scope="module")
def folder_of_two_shards(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("shards"))


def test_webdataset_reads_the_shards(tmp_path):
    import webdataset

    write_folder(tmp_path)
    paths = sorted(str(path) for path in tmp_path.glob("train-*.tar"))
    found = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [(one["__key__"], one["cls"]) for one in found] == [(s.key, s.label) for s in samples("train", 9)]
    assert all(np.array_equal(one["tokens.npy"], s.tokens) for one, s in zip(found, samples("train", 9)))
    assert all(one["json"] == s.info for one, s in zip(found, samples("train", 9)))


def test_a_shard_has_the_bytes_that_it_had_when_tarfile_wrote_it(tmp_path):
    tokens = np.arange(3 * 2 * 16, dtype=np.uint16).reshape(3, 2, 16) * 521
    keys = ["train-a", "train-" + "b" * 80, "train-ä"]
    infos = [{"source": "ä/x.jpg", "box": None, "class": "c" * (600 * n)} for n in range(3)]
    found = write_shard(tmp_path / "a.tar", [TokenSample(keys[n], n * 500, tokens[n], infos[n]) for n in range(3)])
    assert found.sha256 == "60bc9c7956c9136acb35b95f92874eb841cfe85362a387a63eb595026bf149e5"
    assert (found.offsets, found.bytes) == ([640, 3712, 7296], 20480)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for place in ("a", "b"):
        write_folder(tmp_path / place)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [INDEX, SUMMARY, "train-000000.tar", "train-000001.tar", "validation-000000.tar"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_the_index_made_while_writing_equals_the_one_read_from_the_tars(tmp_path):
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", scan=True)
    for name in (INDEX, SUMMARY):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_digest_names_tokens_and_their_meaning(tmp_path):
    digests = {TokenShards(write_folder(tmp_path / str(n)), "train").digest for n in range(2)}
    assert len(digests) == 1
    name = tmp_path / "0" / "train-000000.tar"
    contents = write_shard(name, samples("train", 5, seed=1))
    digests.add(write_index(tmp_path / "0", META, [(name.name, "train")], contents=[contents]))
    other = replace(META, tokenizer="another")
    digests.add(write_index(tmp_path / "0", other, [(name.name, "train")], contents=[contents]))
    assert len(digests) == 3


def test_copies_in_threads_and_other_processes_read_the_same(folder_of_two_shards):
    shards = TokenShards(folder_of_two_shards, "train")
    everything = np.arange(9).repeat(VIEWS), np.tile(np.arange(VIEWS), 9)
    expected = shards.tokens(*everything)
    assert np.array_equal(pickle.loads(pickle.dumps(shards)).tokens(*everything), expected)
    shards._open = OpenFiles(limit=1)
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(f, expected) for f in pool.map(lambda _: shards.tokens(*everything), range(200)))
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(shards.tokens(*everything), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(shards.tokens(*everything), expected)


def open_files() -> list[str]:
    """Return what this process has open; other threads may close files meanwhile."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


def test_no_more_files_stay_open_than_allowed(tmp_path):
    write_folder(tmp_path, sizes={"train": [1] * 40, "validation": [1]})
    shards = TokenShards(tmp_path, "train")
    shards._open = OpenFiles(limit=16)
    shards.tokens(np.arange(40), np.zeros(40, int))
    assert sum(path.startswith(str(tmp_path)) for path in open_files()) == 16
    assert np.array_equal(shards.tokens(np.arange(40), np.zeros(40, int)), [s.tokens[0] for s in samples("train", 40)])


@pytest.mark.parametrize(
    ("index", "view"), [(9, 0), (-10, 0), (0, VIEWS), (0, -1)], ids=["index", "negative index", "view", "negative view"]
)
def test_what_does_not_exist_is_no_sample(folder_of_two_shards, index, view):
    with pytest.raises(IndexError):
        TokenShards(folder_of_two_shards, "train").tokens(np.array([index]), np.array([view]))


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        shards = TokenShards(folder, split)
        shards.tokens(np.arange(len(shards)), np.zeros(len(shards), int))
    assert "\n" not in str(caught.value) and ("run `" in str(caught.value) or "check data." in str(caught.value))
    return str(caught.value)


def test_an_incomplete_folder_is_refused_in_one_sentence(tmp_path):
    assert "no token shards in" in refusal(tmp_path)
    write_folder(tmp_path)
    assert "holds no test samples" in refusal(tmp_path, "test")
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def damage(name: str, content: bytes | None) -> str:
        for other, saved in whole.items():
            (tmp_path / other).write_bytes(saved)
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
        return refusal(tmp_path)

    assert "shard train-000001.tar is missing" in damage("train-000001.tar", None)
    shard = whole["train-000000.tar"]
    assert "shard train-000000.tar is shorter than its index says" in damage("train-000000.tar", shard[:-512])
    assert "shard train-000000.tar is longer than its index says" in damage("train-000000.tar", shard + b"x")
    changed = bytearray(shard)
    changed[2000] ^= 1
    assert "train-000000.tar is damaged (digest " in damage("train-000000.tar", bytes(changed))
    assert "index.arrow is missing" in damage(INDEX, None)
    assert "index.arrow is damaged" in damage(INDEX, whole[INDEX][:100])
    assert "index.arrow is damaged" in damage(INDEX, b"")
    assert "summary.json is damaged" in damage(SUMMARY, whole[SUMMARY][:-20])
    changed = json.loads(whole[SUMMARY])
    changed["meta"]["tokenizer"] = "another"
    assert "summary.json is damaged" in damage(SUMMARY, json.dumps(changed).encode())
    changed = json.loads(whole[SUMMARY])
    changed["samples"] = 3
    assert "summary.json is damaged" in damage(SUMMARY, json.dumps(changed).encode())
    del changed["seal"]  # as version 0.1.0 wrote it
    assert "has 12 samples, its summary says 3" in damage(SUMMARY, json.dumps(changed).encode())


def test_a_file_is_held_against_its_digest_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    write_folder(tmp_path / "tokens")
    read = []
    digest = remote.sha256_file
    monkeypatch.setattr(remote, "sha256_file", lambda path: read.append(path.name) or digest(path))

    def look(cache: Path = tmp_path / "cache") -> list[str]:
        read.clear()
        shards = TokenShards(tmp_path / "tokens", "train", cache=cache)
        for copy in (shards, pickle.loads(pickle.dumps(shards))):
            copy.tokens(np.arange(9), np.zeros(9, int))
        return list(read)

    everything = [INDEX, "train-000000.tar", "train-000001.tar"]
    assert look() == everything
    assert look() == []
    os.utime(tmp_path / "tokens" / "train-000001.tar", ns=(1, 1))
    assert look() == ["train-000001.tar"]
    (tmp_path / "a file").touch()
    assert sorted(look(tmp_path / "a file")) == sorted(everything * 2)  # no place for notes: every process looks for itself


def tar_of(files: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def npy(tokens: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, tokens)
    return stream.getvalue()


GOOD = npy(np.zeros((VIEWS, GRID**2), np.uint16))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("a.cls", b"0"), ("a.tokens.npy", GOOD), ("a.json", b"{}")], "expected KEY.tokens.npy, found 'a.cls'"),
        ([("a.tokens.npy", GOOD), ("a.json", b"{}")], "expected 'a.cls', found 'a.json'"),
        ([("a.tokens.npy", GOOD), ("b.cls", b"0")], "expected 'a.cls', found 'b.cls'"),
        ([("a.tokens.npy", GOOD), ("a.cls", b"0")], "ends before 'a.json'"),
        ([("a.tokens.npy", GOOD), ("a.cls", b"0"), ("a.json", b"{}")] * 2, "holds a key twice"),
        ([("a.tokens.npy", GOOD), ("a.cls", b"7"), ("a.json", b"{}")], "expected a class"),
        ([("a.tokens.npy", GOOD), ("a.cls", b"cat"), ("a.json", b"{}")], "expected a class"),
        ([("a.tokens.npy", npy(np.zeros((1, 16), np.uint16)))], "are not uint16 of shape"),
        ([("a.tokens.npy", npy(np.zeros((VIEWS, 16), np.int64)))], "are not uint16 of shape"),
        ([("a.tokens.npy", GOOD[:-2])], "are not uint16 of shape"),
        ([("../a.tokens.npy", GOOD)], "points outside"),
    ],
)
def test_a_foreign_shard_is_refused_in_one_sentence(tmp_path, files, words):
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    with pytest.raises(ValueError, match=words) as caught:
        scan_shard(tmp_path / "x.tar", META)
    assert "x.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_in_two_shards_is_refused(tmp_path):
    contents = [write_shard(tmp_path / name, samples("train", 2)) for name in ("a.tar", "b.tar")]
    with pytest.raises(ValueError, match=r"2 keys occur twice"):
        write_index(tmp_path, META, [("a.tar", "train"), ("b.tar", "train")], contents=contents)


def test_an_interrupted_shard_leaves_nothing_behind(tmp_path):
    def until_it_breaks():
        yield from samples("train", 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", until_it_breaks())
    assert list(tmp_path.iterdir()) == []


def test_shards_far_away_are_copied_when_first_read(tmp_path):
    import fsspec

    write_folder(tmp_path / "here")
    far = fsspec.filesystem("memory")
    far.put(str(tmp_path / "here"), "/bucket/tokens", recursive=True)
    shards = TokenShards("memory://bucket/tokens", "train", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 0
    assert np.array_equal(shards.all_views(7), samples("train", 9)[7].tokens)
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1
    again = pickle.loads(pickle.dumps(shards))
    (copy,) = (tmp_path / "cache").rglob("*.tar")
    copy.write_bytes(bytes(copy.stat().st_size))  # damaged on this disk: fetched again
    assert np.array_equal(pickle.loads(pickle.dumps(shards)).all_views(8), samples("train", 9)[8].tokens)
    far.rm("/bucket/tokens/train-000001.tar")
    assert np.array_equal(again.all_views(8), samples("train", 9)[8].tokens)  # from the copy
    with pytest.raises(
        FileNotFoundError, match=r"memory://bucket/tokens/train-000001\.tar is missing: copy the folder there"
    ):
        TokenShards("memory://bucket/tokens", "train", cache=tmp_path / "empty").all_views(8)
    far.pipe_file("/bucket/tokens/train-000000.tar", b"something else")
    with pytest.raises(OSError, match=r"train-000000\.tar has digest .* copy the folder there again"):
        again.all_views(0)
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1
    far.rm("/bucket", recursive=True)
    with pytest.raises(FileNotFoundError, match=r"no token shards in memory://bucket/tokens"):
        TokenShards("memory://bucket/tokens", "train", cache=tmp_path / "cache")


def test_an_address_nobody_can_open_gets_a_sentence(tmp_path):
    with pytest.raises(OSError, match=r"cannot open nonsense://bucket"):
        Folder("nonsense://bucket", cache=tmp_path).read("x")


def test_a_shard_edited_in_place_with_its_time_set_back_is_found(tmp_path):
    folder = tmp_path / "tokens"
    write_folder(folder)
    TokenShards(folder, "train", cache=tmp_path / "cache").tokens([0], [0])
    shard = folder / "train-000000.tar"
    before = shard.stat()
    with open(shard, "r+b") as stream:
        stream.seek(512 + 200)
        stream.write(b"\x05")
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"train-000000\.tar is damaged"):
        TokenShards(folder, "train", cache=tmp_path / "cache").tokens([0], [0])

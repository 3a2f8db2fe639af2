"""Listing the files of a tar: as tarfile does for sound ones, a sentence for the others."""

import gzip
import io
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpar_core.data.tars import BadTar, Member, members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(files: dict[str, bytes], kind: str = "ustar") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[kind]) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def tar_with(member: tarfile.TarInfo, content: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def named(name: str, **values: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for field, value in values.items():
        setattr(member, field, value)
    return member


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["a.jpg", "folder/b.jpg", "./c.jpg", "d" * 80 + "/" + "e" * 90, "ä" * 40 + ".jpg"])
def test_members_lie_where_tarfile_finds_them(tmp_path, kind, name):
    files = {name: b"first", "z.cls": b"", "long.bin": bytes(range(256)) * 5}
    path = tmp_path / "some.tar"
    path.write_bytes(tar_of(files, kind))
    with tarfile.open(path) as tar:
        expected = [Member(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar]
    assert list(members(path)) == expected
    whole = path.read_bytes()
    assert [whole[m.offset : m.offset + m.size] for m in members(path)] == list(files.values())


def test_a_tar_inside_a_tar_is_read_in_place(tmp_path):
    inner = tar_of({"n1_1.JPEG": b"one", "n1_2.JPEG": b"two"})
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_of({"n0.tar": tar_of({}), "n1.tar": inner}))
    outer = {m.name: m for m in members(path)}
    found = list(members(path, within=outer["n1.tar"]))
    whole = path.read_bytes()
    assert [(m.name, whole[m.offset : m.offset + m.size]) for m in found] == [("n1_1.JPEG", b"one"), ("n1_2.JPEG", b"two")]
    assert list(members(path, within=outer["n0.tar"])) == []


def test_folders_are_passed_over(tmp_path):
    path = tmp_path / "some.tar"
    path.write_bytes(tar_with(named("folder", type=tarfile.DIRTYPE)))
    assert list(members(path)) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tar_of({"../up.jpg": b"x"}), "points outside"),
        (tar_of({"a/../../up.jpg": b"x"}), "points outside"),
        (tar_of({"/etc/passwd": b"x"}), "points outside"),
        (tar_of({"..\\up.jpg": b"x"}), "points outside"),
        (tar_of({"a\nb.jpg": b"x"}), "points outside"),
        (tar_of({"/" + "a" * 150 + "/" + "b" * 150: b"x"}, "pax"), "points outside"),
        (tar_of({"../" + "a" * 150 + "b" * 150: b"x"}, "gnu"), "points outside"),
        (tar_with(named("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")), "a symbolic link"),
        (tar_with(named("a.jpg", type=tarfile.LNKTYPE, linkname="b.jpg")), "a hard link"),
        (tar_with(named("a.jpg", type=tarfile.CHRTYPE)), "a device"),
        (tar_with(named("a.jpg", type=tarfile.FIFOTYPE)), "a pipe"),
        (tar_with(named("a.jpg", type=tarfile.GNUTYPE_SPARSE)), "sparse"),
        (tar_with(named("a.jpg", type=b"Z")), "unknown type"),
        (tarfile.TarInfo.create_pax_global_header({"path": "a.jpg"}) + tar_of({"b.jpg": b"x"}), "all its files one path"),
        (b"", "without its end mark"),
        (b"<html>not found</html>" * 100, "is not a tar"),
        (tar_of({"a.jpg": bytes(5000)})[:2000], "cut off inside"),
        (tar_of({"a.jpg": bytes(1000)})[: 512 + 1024], "without its end mark"),
    ],
)
def test_a_hostile_or_broken_tar_is_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(BadTar, match=words) as caught:
        list(members(path))
    assert "bad.tar" in str(caught.value) and "\n" not in str(caught.value)


def with_size(content: bytes, field: bytes) -> bytes:
    """The tar with another size field in its first header, its checksum right."""
    changed = bytearray(content)
    changed[124:136] = field
    changed[148:156] = b" " * 8
    changed[148:155] = b"%06o\0" % sum(changed[:512])
    return bytes(changed)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("field", [b"-0000001000\0", b"+0000000001\0", b"0o000000001\0", b"00000_00001\0", b"0000000 001\0"])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_a_size_that_is_no_octal_number_never_leads_back(tmp_path, field, kind):
    """A size of -512 would send the reader to the same header for ever."""
    path = tmp_path / "bad.tar"
    path.write_bytes(with_size(tar_with(named("a.jpg", type=kind), b"x"), field))
    with pytest.raises(BadTar, match="is not an octal number"):
        list(members(path))


def test_a_pax_header_with_an_endless_length_is_refused(tmp_path):
    path = tmp_path / "bad.tar"
    path.write_bytes(tar_with(named("pax", type=b"x", size=6000), b"9" * 5992 + b" path=a\n"))
    with pytest.raises(BadTar, match="a pax header cannot be read"):
        list(members(path))


def test_what_follows_the_end_of_a_tar_is_refused_and_not_lost(tmp_path):
    path, one = tmp_path / "some.tar", tar_of({"a.jpg": b"x"})
    path.write_bytes(one + b"\0" * 100_000)
    assert [member.name for member in members(path)] == ["a.jpg"]
    for more in (tar_of({"b.jpg": b"y"}), b"\0" * 70_000 + b"junk"):
        path.write_bytes(one + more)
        with pytest.raises(BadTar, match=r"has its end mark at byte 1024, and more follows at byte \d+"):
            list(members(path))


def test_an_inner_tar_cannot_reach_beyond_its_own_end(tmp_path):
    inner = bytearray(tar_of({"a.jpg": b"x"}))
    inner[124:135] = b"%011o" % 50_000
    inner[148:156] = b" " * 8
    inner[148:155] = b"%06o\0" % sum(inner[:512])
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_of({"n.tar": bytes(inner), "rest": bytes(100_000)}))
    (outer, _) = members(path)
    with pytest.raises(BadTar, match=r"inner n\.tar is cut off inside"):
        list(members(path, within=outer))


@settings(max_examples=200)
@given(length=st.integers(0, 6000), place=st.integers(0, 6000), value=st.integers(0, 255))
def test_a_damaged_tar_never_loses_members_silently(tmp_path: Path, length, place, value):
    files = {f"{name}.jpg": bytes(700) for name in "abc"}
    sound = tar_of(files)
    path = tmp_path / "some.tar"
    path.write_bytes(sound[:length])
    if length >= 3 * (512 + 1024) + 512:
        assert len(list(members(path))) == 3
    else:
        with pytest.raises(BadTar):
            list(members(path))
    damaged = bytearray(sound)
    damaged[place % len(sound)] = value
    path.write_bytes(damaged)
    with suppress(BadTar):
        assert len(list(members(path))) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        (gzip.compress(b"x" * 2000, mtime=0), "compressed by gzip"),
        (b"PK\x03\x04" + bytes(600), "a zip file"),
        (b"\n<!DOCTYPE html><title>Sign in</title>" + bytes(600), "a web page"),
        (b"<HTML>" * 200, "a web page"),
    ],
)
def test_what_lies_in_place_of_a_tar_is_named(tmp_path, content, words):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(BadTar, match=f"a.tar is not a tar but {words}"):
        list(members(tmp_path / "a.tar"))

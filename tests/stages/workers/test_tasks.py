"""Records of finished units: what was damaged since is made again, with one line that names the file."""

import pytest

from stages.workers.tasks import facts_of_unit, finish_unit, finished_unit


@pytest.fixture
def work(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"tokens")
    finish_unit(tmp_path, "train-000000.tar", ["train-000000.tar"], count=3)
    return tmp_path


def test_a_finished_unit_gives_its_facts_back(work, capsys):
    assert finished_unit(work, "train-000000.tar") == facts_of_unit(work, "train-000000.tar") == {"count": 3}
    assert finished_unit(work, "train-000001.tar") is None
    assert capsys.readouterr().err == ""


DAMAGE = {
    "record empty": ("train-000000.tar.json", lambda b: b"", "is empty"),
    "record cut": ("train-000000.tar.json", lambda b: b[:40], "is damaged"),
    "record of another type": ("train-000000.tar.json", lambda b: b"[1, 2]", "is damaged"),
    "record of an older version": ("train-000000.tar.json", lambda b: b'{"sum": 1.0, "count": 3}', "of an older version"),
    "record edited": ("train-000000.tar.json", lambda b: b.replace(b'"count": 3', b'"count": 4'), "was edited"),
    "file changed": ("train-000000.tar", lambda b: b"tokenz", "is damaged (digest"),
    "file gone": ("train-000000.tar", None, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_unit_is_made_again_and_named_in_one_line(work, capsys, damage):
    name, change, words = DAMAGE[damage]
    path = work / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    assert finished_unit(work, "train-000000.tar") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and words in line and line.endswith("it is made again")


def test_a_record_under_another_name_is_not_taken(work, capsys):
    (work / "train-000000.tar.json").rename(work / "train-000001.tar.json")
    assert finished_unit(work, "train-000001.tar") is None
    assert "is of train-000000.tar, expected train-000001.tar" in capsys.readouterr().err

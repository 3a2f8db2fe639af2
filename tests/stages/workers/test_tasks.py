"""Units of work here, and their records: what was damaged since is made again, with one line that names the file."""

import pytest

from stages.workers.tasks import KeptLast, facts_of_unit, finish_unit, finished_unit, run_units


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


@pytest.mark.parametrize("at_once", [1, 3])
def test_units_are_done_by_one_worker_each_with_its_result_and_what_it_raises_is_raised(at_once):
    built = []

    def build(threads):
        built.append(threads)
        return lambda unit: 12 // unit

    assert dict(run_units([1, 2, 3, 4], build, section="x", at_once=at_once)) == {1: 12, 2: 6, 3: 4, 4: 3}
    assert len(built) == 1
    found = run_units([3, 0], build, section="x", at_once=at_once)
    assert next(found) == (3, 4)
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert list(run_units([], build, section="x", at_once=at_once)) == [] and len(built) == 2


def test_only_the_last_thing_is_kept_and_the_one_before_is_freed_first():
    class Network:
        alive = 0

        def __init__(self):
            assert Network.alive == 0
            Network.alive += 1

        def __del__(self):
            Network.alive -= 1

    kept = KeptLast()
    first = id(kept.get("a", Network))
    assert id(kept.get("a", Network)) == first
    kept.get("b", Network)
    assert Network.alive == 1

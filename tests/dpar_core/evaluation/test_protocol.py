"""Score files and protocols: what is read back, what is refused, and when two numbers may be compared."""

import json
from dataclasses import replace

import pytest

from dpar_core.evaluation.protocol import Interval, Protocol, ScoreError, Scores, read_scores, refuse_mixed
from dpar_core.files import Damaged, digest_of, write_record


def scored() -> Scores:
    protocol = Protocol("demo", "f" * 16, "r.npz", "d" * 16, 6, 6, 8, 8, ("lossless",), 1, 1)
    return Scores({"eval/fd_demo": 1.5}, {"eval/fd_demo": Interval(1.0, 2.0)}, protocol, {"source": "x"})


@pytest.mark.parametrize(
    ("images", "splits", "same"), [(4_999, 1, True), (10_000, 2, True), (7_000, 3, True), (7_000, 2, False)]
)
def test_a_protocol_has_another_id_only_where_parts_of_the_inception_score_changed(images, splits, same):
    protocol = Protocol("demo", "f", "r", "d", 9, images, 8, 8, ("lossless",), 1, splits)
    without = {name: value for name, value in protocol.to_json().items() if name != "reference"}
    assert (protocol.id == digest_of(without)[:8]) == same


def test_a_score_file_gives_back_its_scores(tmp_path):
    scores = scored()
    write_record(tmp_path / "a.json", scores.to_json())
    assert read_scores(tmp_path / "a.json") == scores
    other = replace(scores, protocol=replace(scores.protocol, image_width=7))
    with pytest.raises(ScoreError, match="they differ in image_width 8 / 7"):
        refuse_mixed([scores, other], ["a", "b"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found["protocol"].update(images=7), "changed by hand or damaged"),
        (lambda found: found["protocol"].update(images="six"), "damaged protocol"),
        (lambda found: found["protocol"].pop("image_width"), "another version of this project .*image_width"),
        (lambda found: found.update(protocol=[1]), "another version"),
        (lambda found: found.update({"eval/fd_demo": "1.5"}), "not finite"),
        (lambda found: found.update(intervals=[1, 2]), "not finite"),
        (lambda found: found.update(intervals={"eval/fd_demo": [1]}), "not finite"),
        (lambda found: found.pop("protocol_id"), "is not a score file"),
    ],
)
def test_a_changed_score_file_is_refused(tmp_path, change, words):
    found = scored().to_json()
    change(found)
    write_record(tmp_path / "a.json", found)
    with pytest.raises(ScoreError, match=words):
        read_scores(tmp_path / "a.json")


def test_a_score_without_its_digest_or_with_another_is_refused(tmp_path):
    found = scored().to_json()
    write_record(tmp_path / "a.json", found)
    whole = json.loads((tmp_path / "a.json").read_text())
    for edited in (found, {**found, "eval/fd_demo": float("nan")}, {**whole, "eval/fd_demo": 1.4}):
        (tmp_path / "a.json").write_text(json.dumps(edited))
        with pytest.raises(Damaged, match=r"is damaged, or|was edited"):
            read_scores(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"PK\x03\x04", b"[]"])
def test_a_file_that_holds_no_scores_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ScoreError, match="is not a score file"):
        read_scores(tmp_path / "a.json")

"""The short form of `make fuzz`: some inputs for every reader, and those that once were findings."""

import pytest

from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS

# Inputs that ended in an error without a sentence, or were taken for what they were not: (reader, seed, number).
FOUND = (
    ("manifest", 1, 7),
    ("manifest", 2, 408),
    ("entropies", 1, 24),
    ("patch maps", 2, 187),
    ("rule", 1, 60),
    ("checkpoints", 2, 152),
    ("unit of work", 2, 1),
    ("training of a report", 1, 145),
    ("training of a report", 11, 684),
    ("checkpoints", 11, 71),
    ("scores", 11, 180),
    ("journal of tracking", 1, 30),
    ("journal of tracking", 2, 152),
    ("TorchScript", 1, 982),
    ("params", 1, 440),
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("DPAR_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_read_or_refused_in_a_sentence(name, tmp_path):
    found = fuzz(TARGETS[name], tmp_path / "fuzz", seed=3, count=3 if TARGETS[name].slow else 15)
    assert not found.findings and found.accepted + found.refused == found.inputs


@pytest.mark.parametrize(("name", "seed", "number"), FOUND)
def test_what_once_was_a_finding_is_none(name, seed, number, tmp_path):
    assert not fuzz(TARGETS[name], tmp_path / "fuzz", seed=seed, first=number, count=1).findings

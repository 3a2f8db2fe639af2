"""Timing the parts of a generator neither changes what is sampled nor stays behind."""

import time

import pytest
import torch

from dpar_core.generation.generate import DPARGenerator, GPTGenerator
from dpar_core.generation.parts import timed_parts
from dpar_core.generation.sampling import SampleSettings
from dpar_core.patches.rule import PatchRule
from tests.helpers.generation_fixtures import GRID, tiny_baseline, tiny_dpar, tiny_gate

RULE = PatchRule("entropy_rows", GRID, threshold=2.4, max_patch_length=3)
DPAR_PARTS = ["entropy model", "patch encoder", "patch transformer", "patch decoder", "output layer"]


@pytest.mark.parametrize("kind", ["dpar", "llamagen"])
def test_every_part_is_timed_and_the_images_are_the_same(kind):
    if kind == "dpar":
        generator = DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings(cfg_scale=2.0, rule=RULE), static=False)
    else:
        generator = GPTGenerator(tiny_baseline(), SampleSettings(cfg_scale=2.0), static=False)
    labels, seeds = torch.tensor([0, 3]), [5, 6]
    plain = generator.generate(labels, seeds).tokens
    parts = dict(vars(generator.stepper))
    with timed_parts(generator) as spent:
        started = time.perf_counter()
        timed = generator.generate(labels, seeds).tokens
        whole = time.perf_counter() - started
    assert torch.equal(timed, plain)
    assert list(spent) == (DPAR_PARTS if kind == "dpar" else ["transformer", "output layer"])
    assert all(seconds > 0 for seconds in spent.values()) and sum(spent.values()) < whole
    assert vars(generator.stepper) == parts and torch.equal(generator.generate(labels, seeds).tokens, plain)


def test_what_runs_as_one_graph_is_not_timed_in_parts():
    generator = GPTGenerator(tiny_baseline(), SampleSettings(), static=True, capture=False)
    with timed_parts(generator) as spent:
        generator.generate(torch.tensor([0]), [5])
    assert spent == {}

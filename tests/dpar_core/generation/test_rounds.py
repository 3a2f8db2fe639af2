"""Images at tokens of their own on the static decoder; test_static.py holds their samples against the ragged decoder."""

import torch

import dpar_core.generation.static as static
from dpar_core.generation.generate import DPARGenerator
from dpar_core.generation.sampling import SampleSettings
from dpar_core.patches.rule import PatchRule
from tests.helpers.generation_fixtures import GRID, TOKENS, tiny_dpar, tiny_gate

ROWS = PatchRule("entropy_rows", GRID, 0.93, 4)


def test_in_rounds_two_tokens_at_most_follow_a_step_of_the_patch_transformer_and_who_is_done_makes_room(monkeypatch):
    generator = DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings(rule=ROWS), static=True, schedule="rounds")
    settled, launched = [], []
    monkeypatch.setattr(static.Static, "launch", lambda self, *name: (launched.append(name), self.functions[name]()))
    labels, seeds = torch.arange(11) % 5, list(range(11))
    lengths = generator.generate(labels, seeds, progress=settled.append).patch_lengths
    needed = [sum(-(-int(length) // 2) for length in one) for one in lengths]  # rounds of an image by itself
    assert sum(settled) == len(labels) * TOKENS and len(set(needed)) > 1 and max(needed) < TOKENS
    assert len(launched) == max(needed) + 1  # the last says that all are done
    places = [0] * 3  # the first that is free takes the next image
    for rounds in needed:
        places[places.index(min(places))] += rounds
    few = DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings(rule=ROWS), static=True, schedule="rounds")
    few.generate(labels[:3], seeds[:3], lanes=3)
    launched.clear()
    again = few.generate(labels, seeds, lanes=3)  # more than the engine was made for
    assert [one.tolist() for one in again.patch_lengths] == [one.tolist() for one in lengths]
    assert len(launched) == max(places) + 1

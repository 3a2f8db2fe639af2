"""Cached generation against the whole network on the whole prefix, the golden runs, and against itself."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpar_core.choices import ENCODED
from dpar_core.generation.generate import DPARGenerator, GPTGenerator
from dpar_core.generation.lanes import Lanes
from dpar_core.generation.sampling import SampleSettings
from dpar_core.generation.stepping import BlockStepper
from dpar_core.models.gpt import entropies_of
from dpar_core.patches.rule import PatchRule, starts_by_entropy, starts_from_lengths
from tests.helpers.generation_fixtures import (
    CLASSES,
    CODES,
    GOLDEN,
    GRID,
    TOKENS,
    golden_dpar,
    golden_gpt,
    tiny_baseline,
    tiny_dpar,
    tiny_gate,
    uncached_dpar,
    uncached_gpt,
)
from tests.helpers.paths import ROOT

# Float32 sums in another order, through eight blocks, on logits of standard deviation 2 to 3.
LOGITS = dict(atol=1e-4, rtol=0)
LABELS = torch.tensor([3, 0, 4, 1, 3, 5, 2])  # 5 is "no class"
SEEDS = [11, 5, 900, 12, 13, 14, 15]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def median_entropy() -> float:
    tokens = torch.randint(CODES, (64, TOKENS), generator=torch.Generator().manual_seed(0))
    return float(entropies_of(tiny_gate(), tokens)[:, 1:].median())


RULES = {
    "rows": lambda: PatchRule("entropy_rows", GRID, median_entropy(), 4),
    "rows without maximum": lambda: PatchRule("entropy_rows", GRID, median_entropy(), None),
    "entropy alone": lambda: PatchRule("entropy", GRID, median_entropy(), None),
    "entropy, maximum 3": lambda: PatchRule("entropy", GRID, median_entropy(), 3),
    "threshold zero": lambda: PatchRule("entropy_rows", GRID, 0.0, 4),
    "threshold ln V": lambda: PatchRule("entropy", GRID, float(np.log(CODES)), None),
    "static 3": lambda: PatchRule("static", GRID, None, None, 3),
    "static 5, maximum 2": lambda: PatchRule("static", GRID, None, 2, 5),
    "one token per patch": lambda: PatchRule("token", GRID),
}


def agrees(generator: DPARGenerator, gate, model, settings, *, given=None) -> None:
    cached = generator.generate(LABELS, SEEDS, given=given, keep_logits=True)
    tokens, logits, lengths, entropies = uncached_dpar(model, gate, LABELS, SEEDS, settings, given)
    torch.testing.assert_close(cached.logits, logits, **LOGITS)
    assert torch.equal(cached.tokens, tokens)
    assert [one.tolist() for one in cached.patch_lengths] == [one.tolist() for one in lengths]
    asked = ~cached.entropies.isnan()
    torch.testing.assert_close(cached.entropies[asked], entropies[asked], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("rule", RULES)
def test_cached_steps_give_the_logits_of_the_full_forward_for_every_patch_rule(rule, cfg_scale):
    settings = SampleSettings(cfg_scale=cfg_scale, rule=RULES[rule]())
    model, gate = tiny_dpar(), tiny_gate()
    agrees(DPARGenerator(model, gate, settings), gate, model, settings)


@pytest.mark.parametrize("encoder_layers", [1, 2])
@pytest.mark.parametrize("encoding", ENCODED)
def test_cached_steps_give_the_logits_of_the_full_forward_for_every_position_encoding(encoding, encoder_layers):
    settings = SampleSettings(cfg_scale=2.0, rule=RULES["rows"]())
    model, gate = tiny_dpar(encoding, encoder_layers=encoder_layers), tiny_gate()
    agrees(DPARGenerator(model, gate, settings), gate, model, settings)


@pytest.mark.parametrize("schedule", [dict(cfg_schedule="linear"), dict(cfg_schedule="interval", cfg_interval=(0.2, 0.6))])
def test_guidance_that_changes_over_the_image_agrees_with_the_full_forward(schedule):
    settings = SampleSettings(cfg_scale=3.0, rule=RULES["rows"](), **schedule)
    model, gate, baseline = tiny_dpar(), tiny_gate(), tiny_baseline()
    for patience in (1, 100):
        agrees(DPARGenerator(model, gate, settings, patience=patience), gate, model, settings)
    cached = GPTGenerator(baseline, settings).generate(LABELS, SEEDS, keep_logits=True)
    tokens, logits = uncached_gpt(baseline, LABELS, SEEDS, settings)
    torch.testing.assert_close(cached.logits, logits, **LOGITS)
    assert torch.equal(cached.tokens, tokens)


@pytest.mark.parametrize("rule", ["rows", "entropy alone", "entropy, maximum 3", "static 3"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_decoder_gate_asks_for_the_entropy_as_if_the_token_stayed_in_the_open_patch(rule, cfg_scale):
    rule = RULES[rule]()
    if rule.reads_entropies:
        rule = replace(rule, threshold=1.2)  # among this decoder's entropies
    settings = SampleSettings(cfg_scale=cfg_scale, rule=rule, gate="decoder")
    model = tiny_dpar()
    generator = DPARGenerator(model, None, settings)
    agrees(generator, None, model, settings)
    if rule.reads_entropies:
        counts = {len(one) for one in generator.generate(LABELS, SEEDS).patch_lengths}
        assert len(counts) > 1  # the batch is ragged, so the gate did decide


def test_filters_and_temperature_reach_the_draw():
    settings = SampleSettings(cfg_scale=2.0, rule=RULES["rows"](), temperature=0.7, top_k=6, top_p=0.8)
    model, gate = tiny_dpar(), tiny_gate()
    agrees(DPARGenerator(model, gate, settings), gate, model, settings)
    plain = DPARGenerator(model, gate, replace(settings, top_k=0, top_p=1.0)).generate(LABELS, SEEDS)
    assert not torch.equal(plain.tokens, DPARGenerator(model, gate, settings).generate(LABELS, SEEDS).tokens)


@pytest.mark.parametrize("count", [1, 6, TOKENS])
def test_given_tokens_stay_and_the_rest_follows_from_them(count):
    given = torch.randint(CODES, (len(LABELS), count), generator=torch.Generator().manual_seed(4))
    settings = SampleSettings(cfg_scale=2.0, rule=RULES["rows"]())
    model, gate, baseline = tiny_dpar(), tiny_gate(), tiny_baseline()
    agrees(DPARGenerator(model, gate, settings), gate, model, settings, given=given)
    cached = GPTGenerator(baseline, settings).generate(LABELS, SEEDS, given=given, keep_logits=True)
    tokens, logits = uncached_gpt(baseline, LABELS, SEEDS, settings, given)
    torch.testing.assert_close(cached.logits, logits, **LOGITS)
    assert torch.equal(cached.tokens, tokens)
    assert torch.equal(cached.tokens[:, :count], given)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_the_baselines_cached_steps_give_the_logits_of_its_full_forward(cfg_scale):
    settings, baseline = SampleSettings(cfg_scale=cfg_scale), tiny_baseline()
    cached = GPTGenerator(baseline, settings).generate(LABELS, SEEDS, keep_logits=True)
    tokens, logits = uncached_gpt(baseline, LABELS, SEEDS, settings)
    torch.testing.assert_close(cached.logits, logits, **LOGITS)
    assert torch.equal(cached.tokens, tokens)


def generators():
    model, gate = tiny_dpar(), tiny_gate()
    by_model = SampleSettings(cfg_scale=2.0, rule=RULES["rows"]())
    by_decoder = SampleSettings(cfg_scale=2.0, rule=PatchRule("entropy_rows", GRID, 1.2, 4), gate="decoder")
    return {
        "dpar": DPARGenerator(model, gate, by_model),
        "dpar, decoder gate": DPARGenerator(model, None, by_decoder),
        "baseline": GPTGenerator(tiny_baseline(), SampleSettings(cfg_scale=2.0)),
        "dpar in bfloat16": DPARGenerator(model, gate, by_model, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("name", generators())
def test_neighbours_in_a_batch_do_not_change_a_bit_of_a_sample(name):
    generator = generators()[name]
    labels, seeds = torch.arange(13) % CLASSES, list(range(100, 113))
    whole = generator.generate(labels, seeds, keep_logits=True)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    for size in (1, 2, 3, 5, 8):
        for part in order.split(size):
            alone = generator.generate(labels[part], [seeds[i] for i in part], keep_logits=True)
            assert torch.equal(alone.tokens, whole.tokens[part])
            assert torch.equal(alone.logits, whole.logits[part])


@pytest.mark.parametrize("name", generators())
def test_the_number_of_threads_does_not_change_a_bit_of_a_sample(name):
    generator = generators()[name]
    one = generator.generate(LABELS, SEEDS, keep_logits=True)
    torch.set_num_threads(2)
    assert torch.equal(generator.generate(LABELS, SEEDS, keep_logits=True).logits, one.logits)


@pytest.mark.parametrize("rule", ["rows", "entropy alone", "entropy, maximum 3"])
def test_the_decoder_runs_again_for_the_patches_that_its_entropy_began_and_for_no_others(rule, monkeypatch):
    rule, rows, decode = replace(RULES[rule](), threshold=1.2), [], Lanes.decode

    def counting(lanes, some):
        rows.append(int((some < lanes.lanes).sum()))  # of the conditional half
        return decode(lanes, some)

    monkeypatch.setattr(Lanes, "decode", counting)
    sampled = DPARGenerator(tiny_dpar(), None, SampleSettings(cfg_scale=2.0, rule=rule, gate="decoder")).generate(
        LABELS, SEEDS
    )
    begun = starts_by_entropy(starts_from_lengths(sampled.patch_lengths, TOKENS), rule)
    assert sum(rows) == len(LABELS) * TOKENS + begun.sum() and begun.any()


@pytest.mark.parametrize("gate", ["entropy_model", "decoder"])
def test_the_schedule_of_launches_does_not_change_a_bit_of_a_sample(gate):
    rule = RULES["rows"]() if gate == "entropy_model" else PatchRule("entropy_rows", GRID, 1.2, 4)
    settings = SampleSettings(cfg_scale=2.0, rule=rule, gate=gate)
    model, entropy_model = tiny_dpar(), tiny_gate()
    eager = DPARGenerator(model, entropy_model, settings).generate(LABELS, SEEDS, keep_logits=True)
    for patience in (2, 3, 1000):
        other = DPARGenerator(model, entropy_model, settings, patience=patience)
        assert torch.equal(other.generate(LABELS, SEEDS, keep_logits=True).logits, eager.logits)


@pytest.mark.parametrize("patience", [1, 2, 1000])
@pytest.mark.parametrize("gate", ["entropy_model", "decoder"])
def test_lanes_that_take_the_next_image_when_they_are_done_draw_the_same_images(gate, patience):
    rule = RULES["rows"]() if gate == "entropy_model" else PatchRule("entropy_rows", GRID, 1.2, 4)
    schedule = dict(cfg_schedule="interval", cfg_interval=(0.0, 0.7))  # lanes with and without an unconditional half
    settings = SampleSettings(cfg_scale=2.0, rule=rule, gate=gate, **schedule)
    generator = DPARGenerator(tiny_dpar(), tiny_gate(), settings, patience=patience)
    whole = generator.generate(LABELS, SEEDS, keep_logits=True)
    for lanes in (1, 3):
        refilled = generator.generate(LABELS, SEEDS, keep_logits=True, lanes=lanes)
        assert torch.equal(refilled.logits, whole.logits)
        assert [one.tolist() for one in refilled.patch_lengths] == [one.tolist() for one in whole.patch_lengths]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_rows_that_begin_no_patch_do_not_pay_and_nothing_but_the_class_is_computed_twice(cfg_scale, monkeypatch):
    rows = Counter()
    original = BlockStepper.__call__

    def counted(self, x, *arguments):
        rows[self] += len(x)
        return original(self, x, *arguments)

    monkeypatch.setattr(BlockStepper, "__call__", counted)
    generator = DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings(cfg_scale=cfg_scale, rule=RULES["rows"]()))
    images, halves, stepper = len(LABELS), 2 if cfg_scale > 1 else 1, generator.stepper
    patches = sum(len(one) for one in generator.generate(LABELS, SEEDS).patch_lengths)
    assert patches < images * TOKENS
    # The last token is never taken up, the last patch never closed; the class opens the patch transformer.
    for blocks, expected in (
        (generator.gate.blocks, images * (TOKENS - 1)),
        (stepper.encoder, images * (TOKENS - 1)),
        (stepper.patch_blocks, halves * patches),
        (stepper.decoder, halves * images * TOKENS),
    ):
        assert [rows[block] for block in blocks] == [expected] * len(blocks)


def test_on_another_device_everything_is_there_and_the_host_waits_once_a_token():
    script = ROOT / "tests" / "helpers" / "other_device.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    on_cuda, fused = cases.pop("kernels on CUDA"), cases.pop("with fused products")
    for name, case in cases.items():
        assert case["same_tokens"] and case["same_patches"], name
        # Other sums: attention of selected rows. In bfloat16 products have eight significant bits there, on guided logits
        # of up to 16 (rounding the weights alone moves them by up to 0.13).
        assert case["difference"] < (0.5 if name == "bfloat16" else 1e-4), name
    assert cases["entropy model"]["waits"] == TOKENS - 1
    assert cases["two lanes, guidance that ends"]["waits"] == 3 * (TOKENS - 1)  # five images, two at a time
    assert cases["static patches"]["waits"] == cases["baseline"]["waits"] == 0
    steps = {name.removeprefix("static decoder, "): case for name, case in cases.items() if name.startswith("static dec")}
    assert 0 < steps["rounds"].pop("waits") < 2 * TOKENS  # five images, three at a time: less than a read per token of each
    assert {name: case["waits"] for name, case in steps.items() if "waits" in case} == {
        "ahead": 0,
        "buckets": TOKENS,
        "top-k and top-p": 0,
        "decoder's entropy": 0,
        "baseline": 0,
    }
    assert not any(case["copies"] for case in steps.values())
    for name, kernels in on_cuda.items():
        before = cases[name]["kernels"]
        print(f"kernels per token, {name}: {before / TOKENS:.0f} of the ragged decoder, {kernels / TOKENS:.0f} on CUDA")
        assert 3 * kernels <= before
    assert fused < 0.75 * on_cuda["entropy model"]


def test_seed_and_label_change_an_image_and_nothing_else_does():
    generator = generators()["dpar"]
    same = generator.generate(torch.tensor([1, 1, 1, 2]), [7, 7, 8, 7]).tokens
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    assert not torch.equal(same[0], same[3])


@pytest.mark.parametrize("case", ["4d_cfg1", "4d_cfg2", "3d_cfg2", "1d_cfg2"])
def test_golden_greedy_generation_comes_out_of_the_caches(case):
    golden = np.load(GOLDEN / "dpar_reference.npz")
    rule = PatchRule("entropy_rows", 8, float(golden["threshold"]), int(golden["max_patch_length"]))
    settings = SampleSettings(cfg_scale=float(case[-1]), rule=rule, greedy=True)
    labels = torch.from_numpy(golden[f"gen_labels_{case}"]).long()
    sampled = DPARGenerator(golden_dpar(case[:2]), golden_gpt("llamagen_gpt_ucond", None), settings).generate(
        labels, [0, 0, 0], keep_logits=True
    )
    assert np.array_equal(sampled.tokens, golden[f"gen_tokens_{case}"])
    for found, expected in zip(sampled.patch_lengths, golden[f"gen_patch_lengths_{case}"]):
        assert found.tolist() == expected[expected > 0].tolist()
    np.testing.assert_allclose(sampled.entropies[:, 1:], golden[f"gen_entropies_{case}"], atol=1e-5)
    if case == "4d_cfg2":
        np.testing.assert_allclose(sampled.logits, golden["gen_logits_4d_cfg2"], atol=1e-4)


@pytest.mark.parametrize("cfg_scale", [1, 2])
def test_golden_greedy_generation_of_the_baseline_comes_out_of_the_caches(cfg_scale):
    golden = np.load(GOLDEN / "llamagen_gpt_c2i.npz")
    labels = torch.from_numpy(golden["gen_labels"]).long()
    settings = SampleSettings(cfg_scale=cfg_scale, greedy=True)
    sampled = GPTGenerator(golden_gpt("llamagen_gpt_c2i", 10), settings).generate(labels, [0, 0, 0], keep_logits=True)
    assert np.array_equal(sampled.tokens, golden[f"gen_tokens_cfg{cfg_scale}"])
    if cfg_scale == 2:
        np.testing.assert_allclose(sampled.logits, golden["gen_logits_cfg2"], atol=1e-4)


def test_caches_stay_within_the_bytes_that_were_computed(monkeypatch):
    import dpar_core.generation.stepping as stepping

    made = []
    original = stepping.KVCache

    def remembered(**arguments):
        made.append(original(**arguments))
        return made[-1]

    monkeypatch.setattr(stepping, "KVCache", remembered)
    for generator in (
        DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings(cfg_scale=2.0, rule=PatchRule("token", GRID))),
        DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings(rule=RULES["threshold zero"]())),
        GPTGenerator(tiny_baseline(), SampleSettings(cfg_scale=2.0)),
    ):
        made.clear()
        generator.generate(LABELS, SEEDS)
        assert sum(cache.nbytes for cache in made) == generator.cache_bytes(len(LABELS))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(labels=torch.tensor([1, 6])), "class 6 does not exist"),
        (dict(labels=torch.tensor([-1, 1])), "class -1 does not exist"),
        (dict(seeds=[1]), "one label and one seed per image"),
        (dict(given=torch.zeros(3, 2, dtype=torch.int64)), "given tokens must be"),
        (dict(given=torch.zeros(2, 17, dtype=torch.int64)), "given tokens must be"),
        (dict(given=torch.full((2, 2), CODES)), "another tokenizer"),
    ],
)
def test_senseless_requests_are_refused_in_a_sentence(change, sentence):
    for generator in (generators()["dpar"], generators()["baseline"]):
        with pytest.raises(ValueError, match=sentence):
            generator.generate(**{"labels": torch.tensor([0, 1]), "seeds": [1, 2], **change})


@pytest.mark.parametrize("threshold", [-0.1, 3.0, float("nan")])
def test_a_threshold_outside_what_entropies_can_be_is_refused(threshold):
    settings = SampleSettings(rule=PatchRule("entropy_rows", GRID, threshold, 4))
    with pytest.raises(ValueError, match="makes no sense for 16 codes"):
        DPARGenerator(tiny_dpar(), tiny_gate(), settings)


def test_a_gate_that_is_missing_or_does_not_fit_is_refused():
    settings = SampleSettings(rule=RULES["rows"]())
    with pytest.raises(ValueError, match="needs an entropy model"):
        DPARGenerator(tiny_dpar(), None, settings)
    with pytest.raises(ValueError, match="the entropy model is made for 16 codes, rows of 4 and 5 classes"):
        DPARGenerator(tiny_dpar(), tiny_baseline(), settings)
    with pytest.raises(ValueError, match="expected a patch rule"):
        DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings())
    with pytest.raises(ValueError, match="no class token"):
        GPTGenerator(tiny_gate(), SampleSettings())

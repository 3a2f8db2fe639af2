"""The static decoder, run eagerly on the CPU, against the ragged one: same tokens, patches, entropies and logits."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import dpar_core.generation.static as static
from dpar_core.generation.generate import DPARGenerator, Generated, GPTGenerator
from dpar_core.generation.sampling import SampleSettings
from dpar_core.models.gpt import entropies_of
from dpar_core.patches.rule import PatchRule
from dpar_core.precision import dtype_of
from tests.helpers.generation_fixtures import CODES, GRID, TOKENS, tiny_baseline, tiny_dpar, tiny_gate
from tests.helpers.paths import ROOT

LABELS, SEEDS = torch.tensor([3, 0, 4, 1, 5]), [11, 5, 900, 12, 13]  # 5 is "no class"
ROWS = PatchRule("entropy_rows", GRID, 0.93, 4)
INTERVAL = dict(cfg_schedule="interval", cfg_interval=(0.2, 0.6))
GIVEN = torch.randint(CODES, (5, 2 * GRID), generator=torch.Generator().manual_seed(4))

# name: settings, position encoding, encoder layers, tokens given
CASES = {
    "rows, 4d": (SampleSettings(cfg_scale=2.0, rule=ROWS), "4d", 1, None),
    "no guidance, 3d, two encoder layers": (SampleSettings(rule=replace(ROWS, max_patch_length=None)), "3d", 2, None),
    "entropy alone, 1d, linear": (
        SampleSettings(cfg_scale=3.0, cfg_schedule="linear", rule=PatchRule("entropy", GRID, 0.93)),
        "1d",
        1,
        None,
    ),
    "guidance that ends, top-k, top-p, given rows": (
        SampleSettings(cfg_scale=3.0, **INTERVAL, top_k=6, top_p=0.9, temperature=0.8, rule=ROWS),
        "4d",
        1,
        GIVEN,
    ),
    "decoder's entropy": (
        SampleSettings(cfg_scale=2.0, gate="decoder", rule=replace(ROWS, threshold=1.2)),
        "4d",
        1,
        None,
    ),
    "decoder's entropy, maximum 3, guidance that ends": (
        SampleSettings(cfg_scale=3.0, **INTERVAL, gate="decoder", rule=PatchRule("entropy", GRID, 1.2, 3)),
        "3d",
        1,
        GIVEN,
    ),
    "static 3, greedy": (
        SampleSettings(cfg_scale=2.0, greedy=True, rule=PatchRule("static", GRID, None, None, 3)),
        "4d",
        1,
        None,
    ),
    "one token per patch": (SampleSettings(cfg_scale=2.0, rule=PatchRule("token", GRID)), "1d", 1, None),
}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(static, "SMALLEST_BUCKET", 2)


def agree(found: Generated, expected: Generated) -> None:
    # Float32 sums in another order.
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.entropies, expected.entropies, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(found.tokens, expected.tokens)
    assert [one.tolist() for one in found.patch_lengths] == [one.tolist() for one in expected.patch_lengths]


@pytest.mark.parametrize("name", CASES)
def test_steps_of_fixed_shape_sample_what_the_ragged_decoder_samples(name):
    settings, encoding, layers, given = CASES[name]
    model, gate = tiny_dpar(encoding, encoder_layers=layers), tiny_gate()
    expected = DPARGenerator(model, gate, settings).generate(LABELS, SEEDS, given=given, keep_logits=True)
    if settings.rule.reads_entropies:
        assert len({len(one) for one in expected.patch_lengths}) > 1  # images begin patches at different tokens
    for schedule, lanes in (("ahead", None), ("buckets", None), ("rounds", None), ("rounds", 2)):
        generator = DPARGenerator(model, gate, settings, static=True, schedule=schedule)
        agree(generator.generate(LABELS, SEEDS, given=given, keep_logits=True, lanes=lanes), expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_gate_rounds_as_the_stage_does_whose_entropies_made_the_patches(precision):
    settings, dtype = SampleSettings(cfg_scale=2.0, rule=ROWS), dtype_of(precision)
    exact = DPARGenerator(tiny_dpar(), tiny_gate(), settings).generate(LABELS, SEEDS).entropies[:, 1:]
    for how in (dict(static=False), dict(static=True, schedule="ahead"), dict(static=True, schedule="buckets")):
        sampled = DPARGenerator(tiny_dpar(), tiny_gate(), settings, gate_dtype=dtype, **how).generate(LABELS, SEEDS)
        expected = entropies_of(tiny_gate(), sampled.tokens, precision)
        # Both round to 11 or 8 bits, each at other places; bounds are three times what was found.
        bound = {"fp16": 1e-2, "bf16": 1e-1}[precision]
        torch.testing.assert_close(sampled.entropies[:, 1:], expected[:, 1:], atol=bound, rtol=0)
        assert not torch.equal(sampled.entropies[:, 1:], exact)


def test_entropies_that_are_not_finite_are_refused():
    gate, settings = tiny_gate(), SampleSettings(rule=ROWS)
    gate.output.weight.mul_(1e6)  # beyond what float16 can hold
    for static_decoder in (False, True):
        generator = DPARGenerator(tiny_dpar(), gate, settings, gate_dtype=torch.float16, static=static_decoder)
        with pytest.raises(ValueError, match=r"entropies in torch.float16 are not finite .* entropies.precision to fp32"):
            generator.generate(LABELS, SEEDS)


@pytest.mark.slow
def test_tritons_kernels_do_what_the_plain_operations_do():
    pytest.importorskip("triton", reason="comes with torch's CUDA builds; its interpreter runs the kernels on a CPU")
    script = ROOT / "tests" / "helpers" / "interpreted_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] and all(found["steps"].values()), found["steps"]
    for name, error in found["products"].items():
        assert error < (1e-2 if "float16" in name else 1e-5), name  # of values around 1: a rounding each of both operands


@pytest.mark.slow
def test_tritons_kernels_compile_for_a_gpu_that_is_not_there_and_fit_its_shared_memory():
    pytest.importorskip("triton", reason="comes with torch's CUDA builds; its compiler needs no GPU")
    script = ["-m", "tests.helpers.compiled_kernels", "90"]
    done = subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"_attend", "_gemv", "_product", "_sample", "_decide", "_open", "_commit", "_refill"} <= found.keys()
    assert all(shared <= 227 * 1024 for _, shared, _ in found.values()), found  # of a multiprocessor of an H100
    variants, _, on_tensor_cores = found["_product"]
    assert variants == on_tensor_cores


@pytest.mark.parametrize("options", [dict(), dict(INTERVAL, top_k=5, temperature=0.7), dict(greedy=True)])
def test_the_baseline_samples_the_same_in_steps_of_fixed_shape(options):
    settings, baseline = SampleSettings(cfg_scale=2.0, **options), tiny_baseline()
    expected = GPTGenerator(baseline, settings).generate(LABELS, SEEDS, given=GIVEN, keep_logits=True)
    agree(GPTGenerator(baseline, settings, static=True).generate(LABELS, SEEDS, given=GIVEN, keep_logits=True), expected)


def test_a_smaller_batch_is_filled_up_and_the_next_batch_starts_afresh():
    settings = SampleSettings(cfg_scale=2.0, rule=ROWS)
    for make in (
        lambda **how: DPARGenerator(tiny_dpar(), tiny_gate(), settings, **how),
        lambda **how: DPARGenerator(tiny_dpar(), tiny_gate(), settings, schedule="rounds", **how),
        lambda **how: GPTGenerator(tiny_baseline(), replace(settings, rule=None), **how),
    ):
        generator = make(static=True)
        generator.generate(LABELS, SEEDS, given=GIVEN, keep_logits=True)
        engine = generator.engine
        found = generator.generate(LABELS[1:4], SEEDS[1:4], keep_logits=True)
        assert generator.engine is engine
        expected = make(static=False).generate(LABELS[1:4], SEEDS[1:4], keep_logits=True)
        agree(found, expected)
        agree(make(static=True).generate(LABELS[1:4], SEEDS[1:4], keep_logits=True, lanes=2), expected)


def test_the_patch_transformer_is_launched_for_no_more_images_than_the_next_bucket():
    assert static.bucket_sizes(1) == [1]
    assert static.bucket_sizes(16) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert static.bucket_sizes(300)[-2:] == [266, 300] and len(static.bucket_sizes(300)) == 8
    launched = []
    rule = PatchRule("entropy", GRID, 1.6)  # begins few patches
    generator = DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings(rule=rule), static=True, schedule="buckets")
    generator.generate(LABELS, SEEDS)
    engine = generator.engine
    original = engine.launch
    engine.launch = lambda *name: (launched.append(name), original(*name))
    begins = generator.generate(LABELS, SEEDS).patch_lengths
    starts = torch.zeros(TOKENS, dtype=torch.int64)
    for lengths in begins:
        starts[torch.tensor([0, *lengths.astype(int).cumsum()[:-1]])] += 1
    expected = [next(size for size in (2, 4, 5) if size >= count) for count in starts.tolist() if count]
    assert [name[1] for name in launched if name[0] == "patch"] == expected
    assert len(expected) < TOKENS  # at some token no image begins a patch


def test_the_memory_that_is_asked_for_beforehand_holds_all_that_the_decoder_keeps():
    for generator in (
        DPARGenerator(tiny_dpar(), tiny_gate(), SampleSettings(cfg_scale=2.0, rule=ROWS), static=True),
        GPTGenerator(tiny_baseline(), SampleSettings(cfg_scale=2.0), static=True),
    ):
        generator.generate(LABELS, SEEDS)
        held = {id(x): x for x in vars(generator.engine).values() if isinstance(x, torch.Tensor)}
        caches = [x for x in vars(generator.engine).values() if isinstance(x, static.StaticCache)]
        kept = sum(x.numel() * x.element_size() for x in held.values()) + sum(cache.nbytes for cache in caches)
        assert kept <= generator.cache_bytes(len(LABELS))
        assert sum(cache.nbytes for cache in caches) >= 0.5 * generator.cache_bytes(len(LABELS)) - 2**17

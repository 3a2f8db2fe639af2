"""What `dpar-cli cost` tells, against the tables of the paper."""

import json

import pytest
import torch
from ruamel.yaml import YAML
from typer import Typer
from typer.testing import CliRunner

from dpar_core.data.images import VIEW_COUNTS
from dpar_core.data.manifest import Manifest, Row, write_manifest
from dpar_core.data.shards import TokenMeta, TokenSample, write_shard
from dpar_core.generation.sampling import SampleSettings
from dpar_core.models import memory
from dpar_core.models.flops import guidance_passes, vq_flops
from dpar_core.models.vq import VQ, VQConfig, most_images
from pipeline.cost import Prices, _table, cost, costs
from stages.params import load_params, parse_params
from stages.shared.configs import dpar_config, entropy_config, llamagen_config, vq_config
from tests.helpers.paths import ROOT

A100 = Prices("A100", 0.4, 2.0)
# size: width, heads, layers of encoder, patch transformer, decoder; parameters of DPAR and of the baseline
SIZES = {
    "b": (768, 12, (1, 8, 3), 115_021_824, 110_888_448),
    "l": (1024, 16, (1, 19, 4), 351_306_752, 342_910_976),
    "xl": (1280, 20, (1, 30, 5), 789_455_360, 774_699_520),
    "xxl": (1536, 24, (1, 41, 6), 1_434_579_456, 1_410_972_672),
}
# GFLOPs of the baseline and of DPAR, percent saved
TABLE = {
    ("b", 256): (52.34, 39.98, 23.6),
    ("l", 256): (172.87, 117.19, 32.2),
    ("xl", 256): (397.28, 257.70, 35.1),
    ("xxl", 256): (728.00, 462.26, 36.5),
    ("b", 384): (124.57, 88.44, 29.0),
    ("l", 384): (407.08, 249.99, 38.6),
    ("xl", 384): (927.86, 540.42, 41.8),
    ("xxl", 384): (1692.35, 960.76, 43.2),
}


def paper(size: str, pixels: int, **patching):
    """The demo's params with the paper's shapes and recipe."""
    raw = YAML(typ="safe").load((ROOT / "params" / "demo.yaml").read_text())
    width, heads, (encoder, patch, decoder), _, _ = SIZES[size]
    raw["data"] |= {
        "source": "imagefolder",
        "train": "t",
        "validation": "v",
        "classes": "imagenet",
        "image_size": pixels,
        "views": "ten_crop_both",
    }
    raw["tokenizer"] |= {
        "codebook_size": 16384,
        "base_width": 128,
        "channel_multipliers": [1, 1, 2, 2, 4],
        "z_channels": 256,
    }
    raw["entropy_model"] |= {"size": "B", "width": 768, "heads": 12, "layers": 12, "ffn_multiple": 256}
    raw["model"] |= {
        "width": width,
        "heads": heads,
        "encoder_layers": encoder,
        "patch_layers": patch,
        "decoder_layers": decoder,
        "ffn_multiple": 256,
    }
    raw["train"] |= {"steps": 1_501_368, "batch_size": 256, "equal_time_step": None}  # 300 epochs
    rule = {"threshold": {256: 7.8, 384: 7.9}[pixels], "target_mean_length": None, "max_patch_length": 4}
    raw["patching"] |= {**rule, **patching}
    return parse_params(raw)


@pytest.mark.parametrize(("size", "pixels"), TABLE)
def test_figures_are_those_of_the_published_tables(size, pixels):
    costed = costs(paper(size, pixels), prices=A100).models
    baseline, dpar, saved = TABLE[size, pixels]
    assert (costed["dpar"].parameters, costed["llamagen"].parameters) == SIZES[size][3:]
    assert round(costed["llamagen"].forward_gflops, 2) == baseline
    assert round(costed["dpar"].forward_gflops, 2) == dpar
    assert round(costed["dpar"].saved_percent, 1) == saved
    assert costed["entropy_model"].parameters == 110_119_680
    assert round(costed["entropy_model"].forward_gflops, 2) == TABLE["b", pixels][0]


@pytest.mark.parametrize("kind", ["dpar", "llamagen"])
@pytest.mark.parametrize(("size", "pixels"), TABLE)
def test_the_sixteen_presets_have_the_figures_of_the_published_tables(size, pixels, kind):
    costed = costs(load_params(ROOT / "params" / f"imagenet{pixels}-{kind}-{size}.yaml"), prices=A100).models
    baseline, dpar, saved = TABLE[size, pixels]
    assert (costed["dpar"].parameters, costed["llamagen"].parameters) == SIZES[size][3:]
    assert round(costed["llamagen"].forward_gflops, 2) == baseline
    assert (round(costed["dpar"].forward_gflops, 2), round(costed["dpar"].saved_percent, 1)) == (dpar, saved)
    assert costed[kind].epochs == pytest.approx(300, abs=0.01)


ABLATIONS = {
    "token": {"patching.mode": "token"},
    "static2": {"patching.mode": "static"},
    "entropy": {"patching.mode": "entropy", "patching.max_patch_length": None},
    "entropy-max4": {"patching.mode": "entropy"},
    "entropy-max4-rows": {},
    "rotary-1d": {"model.position_encoding": "1d"},
    "rotary-3d": {"model.position_encoding": "3d"},
    "rotary-4d": {},
    "depth-1-4": {},
    "depth-2-3": {"model.encoder_layers": 2, "model.decoder_layers": 3},
    "depth-3-2": {"model.encoder_layers": 3, "model.decoder_layers": 2},
    "depth-4-1": {"model.encoder_layers": 4, "model.decoder_layers": 1},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_thing_and_trains_for_fifty_epochs(name):
    def flat(params) -> dict:
        return {
            f"{section}.{key}": value
            for section, values in params.model_dump().items()
            if isinstance(values, dict)
            for key, value in values.items()
            if key != "precision"
        }

    base, ablation = (load_params(ROOT / "params" / f"{n}.yaml") for n in ("imagenet256-dpar-l", f"ablation-{name}"))
    of_base, changed = flat(base), flat(ablation)
    length = {"train.steps", "train.equal_time_step", "entropy_model.train"}
    assert {k: v for k, v in changed.items() if v != of_base[k] and k not in length} == ABLATIONS[name]
    costed = costs(ablation, prices=A100, patches=142).models
    assert costed["dpar"].epochs == pytest.approx(50, abs=0.01)


@pytest.mark.parametrize(
    ("size", "pixels", "dpar", "baseline"), [("b", 256, 132, 105), ("xl", 256, 568, 795), ("xl", 384, 1205, 1856)]
)
def test_generation_counts_the_entropy_model_once_and_the_rest_twice_and_then_the_encoder_once_too(
    size, pixels, dpar, baseline
):
    """dpar: the method's count, which doubles the patch encoder; generation does not."""
    costed = costs(paper(size, pixels), prices=A100)
    found = costed.models["dpar"]
    assert round(found.generation_cfg_gflops_with_entropy_model) == dpar
    n, m, d, f = costed.tokens_per_image, costed.patches_per_image, *{"b": (768, 2048), "xl": (1280, 3584)}[size]
    encoder = (n - 1) * 2 * (4 * d**2 + 3 * d * f) + 4 * (n - 1) ** 2 * d + 4 * d**2 * (m + n - 1) + 4 * m * (n - 1) * d
    assert found.generation_cfg_gflops_with_entropy_model - found.generation_cfg_gflops_encoder_once == pytest.approx(
        encoder / 1e9
    )
    assert round(costed.models["llamagen"].generation_cfg_gflops) == baseline


def test_sampling_counts_what_is_guided_and_a_gate_that_is_asked():
    """Whole forward passes for all tokens or up to the last guided one; static patches ask no entropy model."""
    assert guidance_passes(1.0, "constant", (0, 1), tokens=256) == 1
    assert guidance_passes(2.0, "linear", (0, 0.1), tokens=256) == 2
    assert guidance_passes(2.0, "interval", (0.2, 0.501), tokens=100) == 1.51
    for end in (0.07, 0.14, 0.29, 0.57):  # where the product with 100 is no whole number in floating point
        settings = SampleSettings(cfg_scale=2.0, cfg_schedule="interval", cfg_interval=(0.0, end))
        guided = int((settings.scales(100) != 1).sum())
        assert guidance_passes(2.0, "interval", (0.0, end), tokens=100) == 1 + guided / 100

    def sampling(**changes):
        raw = paper("b", 256).model_dump()
        for section, values in changes.items():
            raw[section] |= values
        return costs(parse_params(raw), prices=A100, patches=142).other_work["sampling"].exaflops

    whole, half = sampling(), sampling(sample={"cfg_schedule": "interval", "cfg_interval": [0.0, 0.5]})
    static = sampling(patching={"mode": "static", "threshold": None, "max_patch_length": None})
    costed = costs(paper("b", 256), prices=A100, patches=142).models
    images = paper("b", 256).sample.images
    gate = costed["entropy_model"].forward_gflops
    once = (
        costed["dpar"].generation_cfg_gflops_encoder_once - gate - costed["dpar"].forward_gflops
    )  # of a second forward pass
    passes = once + 2 * costed["llamagen"].forward_gflops
    assert whole - half == pytest.approx(images * 0.5 * passes * 1e-9)
    assert whole - static == pytest.approx(images * gate * 1e-9)
    n, d, f, v = 256, 768, 2048, 16384  # a decoder of three layers is its own gate for the patches that no row begins
    one = 3 * (2 * (4 * d**2 + 3 * d * f) + 4 * n * d) + 2 * v * d
    by_decoder = sampling(sample={"gate": "decoder"})
    assert by_decoder - static == pytest.approx(images * (142 - 17) * one / 1e18)


@pytest.mark.parametrize("changes", [{"patching": {"mode": "static", "threshold": None}}, {"sample": {"gate": "decoder"}}])
def test_an_entropy_model_that_is_not_asked_is_no_part_of_generation(changes):
    raw = paper("b", 256).model_dump()
    for section, values in changes.items():
        raw[section] |= values
    estimate = costs(parse_params(raw), prices=A100, patches=142)
    found = estimate.models["dpar"]
    assert found.generation_gflops_with_entropy_model is None and found.generation_cfg_gflops_with_entropy_model is None
    assert (
        found.generation_cfg_gflops_encoder_once < 2 * found.forward_gflops + estimate.models["entropy_model"].forward_gflops
    )
    printed = _table("b", estimate)
    assert "to generate" not in printed and "with entropy model and entropies" in printed


def test_hours_and_price_follow_from_flops():
    costed = costs(paper("b", 256), prices=Prices("A100", 0.5, 3.0)).models["dpar"]
    operations = 3 * costed.forward_gflops * 1e9 * 1_501_368 * 256
    assert costed.training_exaflops == pytest.approx(operations / 1e18)
    assert costed.gpu_hours == pytest.approx(operations / (312e12 * 0.5) / 3600)
    assert costed.price == pytest.approx(3 * costed.gpu_hours)
    assert costed.epochs == pytest.approx(300, abs=0.01)
    assert costed.checkpoint_gb == pytest.approx(115_021_824 * 12e-9)
    assert costed.state_gb_per_worker == pytest.approx(115_021_824 * 18e-9)  # with a copy of the weights in bfloat16
    parts = costed.state_gb_per_worker + costed.fixed_gb_per_worker + costed.activations_gb_per_worker
    assert costed.memory_gb_per_worker == pytest.approx(parts)


def test_the_rest_of_a_run_is_counted_beside_training():
    costed = costs(load_params(ROOT / "params/imagenet256-dpar-b.yaml"), prices=A100)
    work, models = costed.other_work, costed.models
    assert list(work) == ["tokenizing", "entropies", "sampling", "scoring"]  # published weights: no tokenizer is trained
    hours = sum(one.gpu_hours for one in (*models.values(), *work.values()))
    whole = costed.whole_run
    assert whole.gpu_hours == pytest.approx(hours) and whole.price == pytest.approx(2 * hours)
    assert whole.days_on_its_workers == pytest.approx(hours / 8 / 24)
    assert models["dpar"].hours_on_its_workers == pytest.approx(models["dpar"].gpu_hours / 8)


def test_the_tokenizer_is_counted_layer_by_layer():
    """Convolutions by the sizes that go through them; attention and the search of codes are the rest."""
    raw = YAML(typ="safe").load((ROOT / "params" / "demo.yaml").read_text())
    params = parse_params(raw)
    model, found = VQ(vq_config(params.tokenizer)), [0]

    def count(layer, _, out):
        found[0] += 2 * out.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        codes = model.encode(torch.zeros(1, 3, 32, 32))
        encode, (found[0]) = found[0], 0
        model.decode(codes)
    costed = vq_flops(model.config, 32)
    width = params.tokenizer.base_width * params.tokenizer.channel_multipliers[-1]
    attention = 4 * 64**2 * width
    search = 2 * 64 * params.tokenizer.codebook_size * params.tokenizer.codebook_dim
    blocks = [
        sum(type(one).__name__ == "AttentionBlock" for one in half.modules()) for half in (model.encoder, model.decoder)
    ]
    assert costed == (encode + blocks[0] * attention + search, found[0] + blocks[1] * attention)


def test_token_shards_have_the_size_that_was_given(tmp_path):
    """A shard of 40 images; tar rounds a whole file up to 10,240 bytes."""
    import numpy as np

    meta = TokenMeta(16, 512, "adm_center_flip", 2, 64, ("a",), "t", "m")
    samples = [TokenSample(f"image-{i:06d}", 0, np.zeros((2, meta.tokens), np.uint16), {"view": 1}) for i in range(40)]
    write_shard(tmp_path / "a.tar", samples)
    raw = YAML(typ="safe").load((ROOT / "params" / "demo.yaml").read_text())
    raw["data"] |= {"image_size": 128}
    raw["tokenizer"] |= {"channel_multipliers": [1, 2, 2, 4]}
    costed = costs(parse_params(raw), prices=A100, images=40)
    assert costed.tokens_per_image == 256
    assert 0 <= (tmp_path / "a.tar").stat().st_size - costed.disk_gb["token_shards"] * 1e9 <= 10_240


@pytest.mark.parametrize(("mode", "longest", "patches"), [("token", None, 256), ("static", None, 128), ("static", 1, 256)])
def test_patches_of_fixed_rules_are_known(mode, longest, patches):
    assert costs(paper("l", 256, mode=mode, max_patch_length=longest), prices=A100).patches_per_image == patches


def test_unknown_patch_counts_are_asked_for():
    with pytest.raises(ValueError, match="give --patches"):
        costs(paper("l", 256, threshold=8.0), prices=A100)
    assert costs(paper("l", 256, threshold=8.0), prices=A100, patches=120).patches_per_image == 120
    with pytest.raises(ValueError, match="must lie between 1 and the 256 tokens"):
        costs(paper("l", 256), prices=A100, patches=300)


def test_an_unknown_gpu_and_an_impossible_utilisation_are_refused():
    with pytest.raises(ValueError, match="no peak is known for GPU 'abacus'"):
        costs(paper("b", 256), prices=Prices("abacus", 0.4, 2.0))
    with pytest.raises(ValueError, match="at most 1"):
        costs(paper("b", 256), prices=Prices("A100", 40.0, 2.0))


def test_the_command_prints_a_table_or_json(monkeypatch):
    monkeypatch.chdir(ROOT)
    app = Typer()
    app.command()(cost)
    table = CliRunner().invoke(app, ["demo"])
    assert table.exit_code == 0 and "DPAR saves" in table.output and "GPU-hours" in table.output
    assert "assumed MFU of 40 %" in table.output and max(map(len, table.output.splitlines())) <= 80
    costed = json.loads(CliRunner().invoke(app, ["params/demo.yaml", "--json"]).output)
    assert f"{costed['models']['dpar']['parameters']:,}" in table.output
    whole = costed["models"]["dpar"]["forward_gflops"] + costed["models"]["entropy_model"]["forward_gflops"]
    row = next(line for line in table.output.splitlines() if line.strip().startswith("and the entropy model, to generate"))
    assert float(row.split()[-1].replace(",", "")) == pytest.approx(whole, abs=0.005)


def test_own_images_are_counted_as_they_are_and_not_as_imagenets(tmp_path, monkeypatch):
    raw = YAML(typ="safe").load((ROOT / "params" / "demo.yaml").read_text())
    raw["data"] |= {"source": "imagefolder", "train": "t", "validation": "v"}
    with pytest.raises(ValueError, match="give --images and --classes"):
        costs(parse_params(raw), prices=A100)
    rows = [Row(f"train-{n}", "train", f"train:{n}.png", None, n % 3, "abc"[n % 3]) for n in range(60)]
    (tmp_path / "artifacts" / "data").mkdir(parents=True)
    write_manifest(tmp_path / "artifacts" / "data" / "manifest.parquet", Manifest.of(rows, "abc", {"train": "t"}))
    YAML(typ="safe").dump(raw, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    app = Typer()
    app.command()(cost)
    said = json.loads(CliRunner().invoke(app, ["--json"]).output)
    assert said["training_images"] == 60
    steps, batch = (raw["train"][name] for name in ("steps", "batch_size"))
    assert said["models"]["dpar"]["epochs"] == steps * batch / 60
    YAML(typ="safe").dump(raw | {"data": raw["data"] | {"train": "u", "classes": "imagenet"}}, tmp_path / "params.yaml")
    assert json.loads(CliRunner().invoke(app, ["--json"]).output)["training_images"] == 1_281_167  # not of the other data


@pytest.mark.parametrize(
    "option", ["--images=0", "--patches=0", "--classes=0", "--price=-1", "--utilisation=0", "--currency=s3://A:B@c"]
)
def test_a_number_that_cannot_be_is_refused_and_not_taken_for_left_out(monkeypatch, option):
    monkeypatch.chdir(ROOT)
    app = Typer()
    app.command()(cost)
    refused = CliRunner().invoke(app, ["demo", option])
    assert refused.exit_code and option.partition("=")[0] in f"{refused.output}{refused.exception}"


PAPER = [f"imagenet{pixels}-{kind}-{size}" for pixels in (256, 384) for kind in ("dpar", "llamagen") for size in SIZES]


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_preset_trains_and_samples_within_80_gb_as_it_is(name):
    """By the estimates that `dpar-cli cost` and the check before sampling use."""
    params = load_params(ROOT / "params" / f"{name}.yaml")
    costed = costs(params, prices=A100).models
    for model in costed.values():
        assert model.memory_gb_per_worker <= 80 * memory.TRAINING_SHARE
        assert model.accumulate == model.accumulate_that_fits and model.micro_batch <= model.largest_micro_batch
    shape = {"codebook_size": 16384, "row_width": params.data.image_size // 16}
    dpar = dpar_config(params.model, **shape, num_classes=1000)
    baseline = llamagen_config(params.model, **shape, num_classes=1000)
    gate = entropy_config(params.entropy_model, **shape)
    images, options = params.sample.batch_size, {"guided": True, "value_bytes": 2}
    caches = {
        "dpar": memory.dpar_cache_bytes(dpar, images, longest_patch=4, gate=gate, **options),
        "llamagen": memory.gpt_cache_bytes(baseline, images, **options),
    }
    free = 80e9 - memory.RUNTIME - memory.sampling_weights(dpar, gate, value_bytes=2)
    for wanted in caches.values():
        assert memory.fitting_images(wanted, images, free) == images


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_preset_uses_all_its_gpus_and_trains_no_classifier(name):
    params = load_params(ROOT / "params" / f"{name}.yaml")
    gpus = params.train.workers * params.train.gpus_per_worker
    assert gpus == 8 == params.entropy_model.train.workers
    assert {getattr(params, section).workers for section in ("tokenize_images", "entropies", "sample", "score")} == {gpus}
    assert params.score.features == "inception"
    views = params.tokenize_images.batch_size // VIEW_COUNTS[params.data.views] * VIEW_COUNTS[params.data.views]
    assert views <= most_images(VQConfig(16384, 8, 128, (1, 1, 2, 2, 4), 256), params.data.image_size)


def test_a_micro_batch_that_does_not_fit_gets_the_accumulate_that_does(monkeypatch):
    monkeypatch.chdir(ROOT)
    app = Typer()
    app.command()(cost)
    output = CliRunner().invoke(app, ["imagenet384-dpar-xl", "--gpu", "L40S"]).output
    costed = json.loads(CliRunner().invoke(app, ["imagenet384-dpar-xl", "--gpu", "L40S", "--json"]).output)["models"]["dpar"]
    fits = costed["accumulate_that_fits"]
    assert (
        f"set train.accumulate to {fits}." in " ".join(output.split())
        and fits > 1
        and max(map(len, output.splitlines())) <= 80
    )
    assert 32 // fits <= costed["largest_micro_batch"] < 32

"""The tokenizer stage: trained or imported, measured, and the same bytes after an interruption."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpar_core.data.images import BadImage
from dpar_core.data.manifest import write_manifest
from dpar_core.files import load_weights, sha256_file, write_record
from dpar_core.models.vq import VQ, VQConfig, to_float
from dpar_core.training import codebook
from dpar_core.training.codebook import latents_on_sphere, place_codes, restart_dead_codes, spherical_kmeans
from dpar_core.training.order import DataOrder
from stages import params as P
from stages import tokenizer as stage
from stages.data import make_manifest
from stages.shared.crops import CenterCrops
from stages.tracker import NullTracker
from tests.helpers.paths import ROOT

CONFIG = VQConfig(16, 4, 8, (1, 2), 8, 1, norm_groups=4)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def settings(**changes) -> P.Tokenizer:
    values = {
        "weights": None,
        "weights_key": None,
        "codebook_size": 16,
        "codebook_dim": 4,
        "base_width": 8,
        "channel_multipliers": [1, 2],
        "z_channels": 8,
        "residual_blocks": 1,
        "norm_groups": 4,
        "commitment": 0.25,
        "steps": 10,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup_steps": 3,
        "precision": "fp32",
    }
    return P.Tokenizer(**{**values, **changes})


def photograph(seed: int, size: int = 12) -> np.ndarray:
    """A smooth random picture: (size, size, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> tuple[P.Data, Path]:
    """A folder of images of two classes and its manifest."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("validation", 3)):
        for number, name in enumerate(("ape", "bee")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(photograph(100 * number + index + (50 if split == "validation" else 0))).save(
                    folder / f"{index}.png"
                )
    builtin = P.BuiltinData(train_crops=1, validation_crops=1, crop_min=1, crop_max=1, validation_share=0.5)
    data = P.Data(
        source="imagefolder",
        train=str(root / "train"),
        validation=str(root / "validation"),
        classes="any",
        empty_classes="refuse",
        image_key=None,
        label_key=None,
        image_size=8,
        views="adm_center_flip",
        max_bad_share=0.0,
        builtin=builtin,
    )
    write_manifest(root / "manifest.parquet", make_manifest(data, seed=0))
    return data, root / "manifest.parquet"


def run_stage(folder: Path, manifest, tokenizer: P.Tokenizer, tracker=None, *, work: Path | None = None, seed: int = 0):
    data, path = manifest
    folder.mkdir(parents=True, exist_ok=True)
    outputs = stage.Outputs(folder / "tokenizer.safetensors", folder / "metrics.json", folder / "reconstructions.png")
    params = stage.Params(seed=seed, data=data, tokenizer=tokenizer)
    tracker = tracker or NullTracker()
    seen = folder / "weights_seen.json"
    weights = {"sha256": sha256_file(tokenizer.weights)} if tokenizer.weights else None
    write_record(seen, {"tokenizer.weights": weights})
    stage.run(params, stage.Inputs(path, seen), outputs, tracker, device="cpu", work=work or folder / "work")
    return outputs


def contents(outputs: stage.Outputs) -> tuple[bytes, ...]:
    return outputs.weights.read_bytes(), outputs.metrics.read_bytes(), outputs.picture.read_bytes()


class BreaksOff(NullTracker):
    """Stops the stage the way Ctrl-C does, after some training steps."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        if step is not None and step >= self.left:
            raise KeyboardInterrupt


@pytest.fixture
def quick(monkeypatch):
    """Checkpoints every 2 steps, a log line every step, dead codes restarted every 2 steps."""
    be_quick(monkeypatch)


def be_quick(patch):
    for name, value in (("CHECKPOINT_EVERY", 2), ("LOG_EVERY", 1), ("RESTART_EVERY", 2)):
        patch.setattr(stage, name, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, manifest) -> tuple[bytes, ...]:
    """What an undisturbed run with the values of `quick` writes."""
    with pytest.MonkeyPatch.context() as patch:
        be_quick(patch)
        return contents(run_stage(tmp_path_factory.mktemp("whole"), manifest, settings()))


# Steps 0..2 run unquantized, step 3 places the codes, steps 4 and 6 restart dead ones, 10 is the end.
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 7, 9])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, manifest, quick, whole, after):
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "broken", manifest, settings(), BreaksOff(after))
    assert not (tmp_path / "broken" / "tokenizer.safetensors").exists()
    assert contents(run_stage(tmp_path / "broken", manifest, settings())) == whole


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path, manifest, quick):
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, manifest, settings(), BreaksOff(7))
    seen = []

    class Records(NullTracker):
        def log_metrics(self, metrics, step=None):
            seen.append(step)

    run_stage(tmp_path, manifest, settings(), Records())
    assert [step for step in seen if step is not None] == [7, 8, 9, 10]


KILLED = """
from pathlib import Path
from tests.stages import test_tokenizer_stage as t
t.torch.set_num_threads(1)
t.stage.CHECKPOINT_EVERY = 20
class Stalls(t.NullTracker):
    def log_metrics(self, metrics, step=None):
        if step is not None and step >= 40:
            t.time.sleep(300)
data = t.P.Data.model_validate_json({data!r})
t.run_stage(Path({folder!r}), (data, Path({manifest!r})), t.settings(steps=60), Stalls())
"""


@pytest.mark.slow
def test_a_killed_process_is_continued_to_the_same_bytes(tmp_path, manifest, monkeypatch):
    data, path = manifest
    values = {"data": data.model_dump_json(), "manifest": str(path)}
    code = KILLED.format(folder=str(tmp_path / "killed"), **values)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    checkpoints = tmp_path / "killed" / "work" / "checkpoints"
    until = time.monotonic() + 600
    while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(checkpoints.glob("step-*")) and not (tmp_path / "killed" / "tokenizer.safetensors").exists()
    monkeypatch.setattr(stage, "CHECKPOINT_EVERY", 20)
    found = contents(run_stage(tmp_path / "killed", manifest, settings(steps=60)))
    assert found == contents(run_stage(tmp_path / "whole", manifest, settings(steps=60)))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, manifest, quick, whole):
    assert contents(run_stage(tmp_path / "b", manifest, settings())) == whole
    assert contents(run_stage(tmp_path / "c", manifest, settings(), seed=1))[0] != whole[0]


def test_the_metrics_file_the_tracker_and_the_weights_agree(tmp_path, manifest, quick):
    tracker = NullTracker()
    outputs = run_stage(tmp_path, manifest, settings(), tracker)
    metrics = json.loads(outputs.metrics.read_text())
    names = ("psnr_db", "ssim", "codes_used", "codebook_use", "perplexity", "measured_images")
    assert set(metrics) == {f"tokenizer/{name}" for name in names}
    assert metrics == {name: value for name, value in tracker.metrics.items() if name in metrics}
    assert "train/loss" in tracker.metrics and tracker.pictures == [outputs.picture]
    weights = load_weights(outputs.weights, kind="vq")
    assert weights.meta == {"image_size": 8, "imported": False, "manifest": tracker.inputs["manifest"], "precision": "fp32"}
    assert weights.config["norm_groups"] == 4
    with Image.open(outputs.picture) as picture:
        assert picture.mode == "RGB"


def test_training_learns_to_reconstruct(tmp_path, manifest):
    def psnr(steps):
        outputs = run_stage(tmp_path / str(steps), manifest, settings(steps=steps, lr=3e-3, warmup_steps=min(steps - 1, 40)))
        return json.loads(outputs.metrics.read_text())["tokenizer/psnr_db"]

    assert psnr(120) > psnr(2) + 1


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path, manifest):
    with pytest.raises(RuntimeError, match=r"stopped at step \d+: its loss is (nan|inf); lower tokenizer.lr"):
        run_stage(tmp_path, manifest, settings(lr=1e30))
    assert not (tmp_path / "tokenizer.safetensors").exists()


@pytest.mark.parametrize("key", ["model", "ema", None])
def test_published_weights_are_measured_and_never_trained(tmp_path, manifest, monkeypatch, key):
    torch.manual_seed(3)
    state = VQ(VQConfig(16, 4, 32, (1, 2), 32, 1)).state_dict()
    state |= {name: torch.full_like(one, 0.01) for name, one in state.items() if one.ndim > 1 and not one.any()}
    path = tmp_path / ("vq.pt" if key else "vq.safetensors")
    others = {"model": {name: torch.zeros_like(one) for name, one in state.items()}} if key == "ema" else {}
    torch.save({**others, key: state}, path) if key else save_file(state, path)
    monkeypatch.setattr(stage, "train", lambda *args, **kwargs: pytest.fail("an imported tokenizer was trained"))
    imported = settings(weights=str(path), weights_key=key, base_width=32, z_channels=32, norm_groups=32)
    outputs = run_stage(tmp_path / "out", manifest, imported)
    weights = load_weights(outputs.weights, kind="vq")
    assert weights.meta["imported"] is True
    assert all(torch.equal(weights.state[name], state[name]) for name in state)
    assert json.loads(outputs.metrics.read_text())["tokenizer/codes_used"] >= 1


def test_published_weights_of_another_shape_are_refused(tmp_path, manifest):
    save_file(VQ(VQConfig(16, 4, 32, (1, 2), 32, 1)).state_dict(), tmp_path / "vq.safetensors")
    with pytest.raises(ValueError, match=r"another tokenizer than params\.yaml describes: tokenizer\.base_width is 8"):
        run_stage(tmp_path / "out", manifest, settings(weights=str(tmp_path / "vq.safetensors"), norm_groups=4))


class Rows:
    """Manifest rows and their opener in one: row i opens picture i, (8, 8, 3) uint8; None cannot be read."""

    def __init__(self, pictures):
        self.pictures = pictures
        self.opened = []

    def crops(self):
        return CenterCrops([SimpleNamespace(number=i, source=f"row {i}") for i in range(len(self.pictures))], self, 8)

    def __call__(self, row):
        self.opened.append(row.number)
        if self.pictures[row.number] is None:
            raise BadImage("damaged")
        return self.pictures[row.number]


class Shifted(VQ):
    """Decodes image i of a batch as a grey of 100 + i, and encodes with codes 0, 1, 2, 3 in turn."""

    def encode(self, images):
        return torch.arange(4).repeat(len(images) * 4).view(len(images), 4, 4)

    def decode(self, codes):
        greys = (100.0 + torch.arange(len(codes)) - 128) / 127.5 + 1e-4
        return greys.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def test_the_measures_are_those_of_their_definitions():
    """Images of grey 90 and 106 come back as 100 and 101: errors 10 and 5. Unreadable ones are left out."""
    pictures = Rows([np.full((8, 8, 3), 90, np.uint8), None, np.full((8, 8, 3), 106, np.uint8)]).crops()
    metrics, originals, copies = stage.measure_reconstruction(Shifted(CONFIG).eval(), pictures, np.arange(3), device="cpu")
    assert originals.indices.tolist() == [0, 2] and len(copies) == metrics["tokenizer/measured_images"] == 2
    assert pictures.note("validation") == (
        "warning: 1 validation image cannot be read and is left out (first: row 1: damaged)"
    )
    by_hand = (10 * math.log10(255**2 / 100) + 10 * math.log10(255**2 / 25)) / 2
    assert metrics["tokenizer/psnr_db"] == pytest.approx(by_hand)
    assert metrics["tokenizer/codes_used"] == 4 and metrics["tokenizer/codebook_use"] == 4 / 16
    assert metrics["tokenizer/perplexity"] == pytest.approx(4)
    # Of flat images SSIM is its luminance term alone.
    c1 = (0.01 * 255) ** 2
    ssim = [(2 * a * b + c1) / (a * a + b * b + c1) for a, b in ((90, 100), (106, 101))]
    assert metrics["tokenizer/ssim"] == pytest.approx(np.mean(ssim), abs=1e-6)


def test_a_perfect_copy_counts_as_one_that_is_right_to_the_rounding():
    """One black image that comes back black must not lift the mean without limit."""
    pictures = Rows([np.full((8, 8, 3), 100, np.uint8)]).crops()
    metrics, *_ = stage.measure_reconstruction(Shifted(CONFIG).eval(), pictures, np.arange(1), device="cpu")
    assert metrics["tokenizer/psnr_db"] == pytest.approx(10 * math.log10(255**2 * 12))


def test_an_unreadable_training_image_is_replaced_by_the_next():
    rows = Rows([photograph(0, 8), None, photograph(2, 8)])
    images = rows.crops()
    batch = images.batch(np.array([1, 0]), np.array([0, 1]))
    assert np.array_equal(batch.images[0], rows.pictures[2])
    assert np.array_equal(batch.images[1], rows.pictures[0][:, ::-1])
    assert batch.indices.tolist() == [2, 0]  # a label belongs to the image that was taken
    assert images.note("training").startswith("warning: 1 training image cannot be read") and rows.opened == [1, 2, 0]


def test_an_image_is_decoded_once():
    rows = Rows([photograph(0, 8), photograph(1, 8)])
    images = rows.crops()
    for _ in range(3):
        images.batch(np.array([0, 1]), np.array([0, 1]))
    assert rows.opened == [0, 1]


def tiny_training():
    torch.manual_seed(0)
    rows = Rows([photograph(seed, 8) for seed in range(8)])
    images = rows.crops()
    return VQ(CONFIG), images, DataOrder(images=8, views=2, batch_size=4, seed=0)


def test_placed_codes_lie_among_the_latents():
    """After k-means every code is the mean direction of the latents nearest to it, and the loss of quantizing falls."""
    model, images, order = tiny_training()
    batch = to_float(torch.from_numpy(images.batch(np.arange(8), np.zeros(8, int)).images))
    before = model(batch).loss.item()
    batches = (order.batch(step) for step in range(64))
    place_codes(model, (to_float(torch.from_numpy(images.batch(one.indices, one.views).images)) for one in batches))
    assert model(batch).loss.item() < 0.5 * before
    latents = latents_on_sphere(model, batch)
    assert len(torch.unique((latents @ model.quantize.codebook().T).argmax(1))) > 8


def test_only_codes_that_nothing_chose_are_restarted():
    model, images, _ = tiny_training()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = to_float(torch.from_numpy(images.batch(np.arange(8), np.zeros(8, int)).images))
    (model(batch).images.square().mean() + model(batch).loss).backward()
    optimizer.step()
    table = model.quantize.embedding.weight
    before, moment = table.detach().clone(), optimizer.state[table]["exp_avg"]
    moment.fill_(1.0)
    used = torch.ones(16, dtype=torch.int64)
    used[[2, 5]] = 0
    restart_dead_codes(model, optimizer, batch, used, seed=0, step=7)
    changed = (table != before).any(dim=1)
    assert torch.nonzero(changed).flatten().tolist() == [2, 5]
    cosines = latents_on_sphere(model, batch) @ table[[2, 5]].T
    assert torch.allclose(cosines.max(dim=0).values, torch.ones(2), atol=1e-6)
    assert (moment[[2, 5]] == 0).all() and (moment[[0, 1, 3]] == 1).all()
    assert (used == 0).all()


def test_centres_are_those_of_k_means_walked_latent_by_latent(monkeypatch):
    random = np.random.default_rng(0)
    latents = random.normal(size=(60, 3))
    latents /= np.linalg.norm(latents, axis=1, keepdims=True)
    centres = latents[[0, 14, 29, 44, 59]]
    for _ in range(10):
        groups = [[] for _ in centres]
        for latent in latents:
            groups[int(np.argmax(centres @ latent))].append(latent)
        sums = [np.sum(group, axis=0) for group in groups]  # none of them is empty here
        centres = np.array([one / np.linalg.norm(one) for one in sums])
    given = torch.from_numpy(latents).float()
    whole = spherical_kmeans(given, 5)
    torch.testing.assert_close(whole.double(), torch.from_numpy(centres), atol=1e-6, rtol=0)
    monkeypatch.setattr(codebook, "AT_ONCE", 5 * 7)  # seven latents at a time
    torch.testing.assert_close(spherical_kmeans(given, 5), whole, atol=1e-6, rtol=0)

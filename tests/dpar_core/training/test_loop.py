"""The training loop: what an interrupted run ends with, what stops it, what it reports."""

import itertools
import math
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpar_core.models import flops
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.training import loop, meters
from dpar_core.training.checkpoint import CheckpointError
from dpar_core.training.loop import TrainingRun, TrainingStopped
from dpar_core.training.optim import OptimSettings, adamw, learning_rate
from dpar_core.training.prefetch import Batch, Prefetcher
from tests.helpers.paths import ROOT
from tests.helpers.training_fixtures import (
    DPAR_CONFIG,
    GPT_CONFIG,
    BaselineObjective,
    DPARObjective,
    Recorder,
    TinyData,
    tiny_model,
    tiny_run,
    tiny_settings,
    tiny_store,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def same_weights(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


RESUMED = {"accumulate": 2, "log_every": 1, "validate_every": 4, "precision": "bf16"}


@pytest.fixture(scope="module", params=["gpt", "dpar"])
def undisturbed(request, tmp_path_factory):
    """A kind of model, and the progress and end of a run of it."""
    torch.set_num_threads(1)
    return request.param, *tiny_run(tmp_path_factory.mktemp("whole"), request.param, **RESUMED)[:2]


@pytest.mark.parametrize("crash_after", [3, 5, 7, 12])
def test_resumed_run_ends_with_the_same_weights(tmp_path, undisturbed, crash_after):
    kind, whole, expected = undisturbed
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "broken", kind, hooks=Recorder(crash_after), **RESUMED)
    resumed, found, hooks = tiny_run(tmp_path / "broken", kind, **RESUMED)
    assert hooks.began == [crash_after // 5 * 5 if crash_after > 5 else 0]
    assert same_weights(found.model(), expected.model())
    assert same_weights(found.optimizer(), expected.optimizer())
    assert resumed.curve == whole.curve


def test_a_killed_process_goes_on_to_the_same_weights(tmp_path):
    _, expected, _ = tiny_run(tmp_path / "whole")
    child = textwrap.dedent(
        f"""
        import os, signal, torch
        from pathlib import Path
        from tests.helpers.training_fixtures import Recorder, tiny_run
        torch.set_num_threads(1)
        class Killer(Recorder):
            def log(self, step, metrics):
                if step == 8:
                    os.kill(os.getpid(), signal.SIGKILL)
        tiny_run(Path({str(tmp_path / "killed")!r}), hooks=Killer())
        """
    )
    assert subprocess.run([sys.executable, "-c", child], cwd=ROOT).returncode == -9
    _, found, hooks = tiny_run(tmp_path / "killed")
    assert hooks.began == [5]
    assert same_weights(found.model(), expected.model())


def test_a_finished_run_is_not_trained_again(tmp_path):
    tiny_run(tmp_path)
    progress, _, hooks = tiny_run(tmp_path)
    assert (progress.step, hooks.began, hooks.lines) == (12, [12], {})


def test_the_model_learns_what_is_in_the_data(tmp_path):
    progress, _, hooks = tiny_run(tmp_path, steps=60, validate_every=30, optim=OptimSettings(lr=1e-2))
    assert hooks.lines[1]["train/loss"] == pytest.approx(math.log(16), abs=1e-4)
    assert progress.curve[-1][2] < 0.6 * math.log(16)


def test_activation_checkpointing_changes_nothing(tmp_path):
    _, expected, _ = tiny_run(tmp_path / "plain", "dpar")
    _, found, _ = tiny_run(tmp_path / "checkpointed", "dpar", activation_checkpointing=True)
    assert same_weights(found.model(), expected.model())


def test_micro_batches_add_up_to_the_batch(tmp_path):
    """Without dropout the gradient of two halves is that of the whole, up to the order of float32 sums."""
    for accumulate in (1, 2):
        torch.manual_seed(0)
        settings = tiny_settings(accumulate=accumulate, steps=3)
        model = GPT(replace(GPT_CONFIG, dropout=0.0, class_dropout=0.0))
        store = tiny_store(tmp_path / str(accumulate), "gpt")
        TrainingRun(model, BaselineObjective(), TinyData(settings), settings, store, hooks=Recorder()).run()
    one, two = (tiny_store(tmp_path / name, "gpt").newest().model() for name in "12")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


@pytest.mark.parametrize("kind", ["gpt", "dpar"])
def test_a_run_is_the_recipe_written_out(tmp_path, kind):
    """Image by image, without packing, with AdamW, its schedule and clipping as formulas in float64."""
    optim = OptimSettings(lr=4e-3, lr_schedule="cosine", warmup_steps=2, weight_decay=0.3, clip_norm=0.4)
    settings = tiny_settings(steps=6, accumulate=2, optim=optim, validate_every=3)
    built = {"gpt": (GPT, GPT_CONFIG, BaselineObjective()), "dpar": (DPAR, DPAR_CONFIG, DPARObjective())}
    network, config, objective = built[kind]
    data, config, hooks = (
        TinyData(settings, patches=kind == "dpar"),
        replace(config, dropout=0.0, class_dropout=0.0),
        Recorder(),
    )

    def untrained():
        torch.manual_seed(0)
        return network(config)

    store = tiny_store(tmp_path, kind)
    progress = TrainingRun(untrained(), objective, data, settings, store, hooks=hooks).run()
    model = untrained()
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    moments = {name: (0.0, 0.0) for name in weights}
    losses = []
    for step, lr in enumerate((2e-3, 4e-3, *(2e-3 * (1 + math.cos(math.pi * k / 4)) for k in range(4)))):
        grads, loss = dict.fromkeys(weights, 0.0), 0.0
        for index in data.order.batch(step).indices:
            model.zero_grad()
            one = objective.loss(model, data._batch(np.array([index])))
            one.backward()
            loss += one.item() / 8
            grads = {name: grads[name] + p.grad.double() / 8 for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
        for name, weight in weights.items():
            grad = grads[name] * min(1.0, 0.4 / norm)
            first, second = moments[name] = (
                0.9 * moments[name][0] + 0.1 * grad,
                0.95 * moments[name][1] + 0.05 * grad**2,
            )
            first, second = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
            decayed = weight * (1 - lr * 0.3) if weight.dim() > 1 else weight
            weights[name] = decayed - lr * first / (second.sqrt() + 1e-8)
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
        losses.append(loss)
        line = hooks.lines[step + 1]
        assert (line["train/lr"], line["train/loss"]) == pytest.approx((lr, loss), rel=1e-5)
        assert line["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert norm > 0.4  # so that clipping had something to do
    found = store.newest().model()
    assert max((weights[name] - found[name]).abs().max() for name in found) < 2e-5
    held = np.mean([objective.loss(model, data._batch(np.array([index]))).item() for index in range(8)])
    assert progress.curve[-1] == pytest.approx([6, np.mean(losses[3:]), held], rel=1e-5)


@pytest.mark.parametrize("bad", ["nan weights", "large loss"])
def test_a_bad_loss_stops_before_it_spoils_the_weights(tmp_path, bad):
    class Poisoned(BaselineObjective):
        calls = 0

        def loss(self, model, batch):
            if torch.is_grad_enabled():
                self.calls += 1
            factor = {"nan weights": float("nan"), "large loss": 1e3}[bad] if self.calls == 8 else 1.0
            return super().loss(model, batch) * factor

    settings, store = tiny_settings(), tiny_store(tmp_path, "gpt")
    model = tiny_model("gpt")
    before = {}

    class Watch(Recorder):
        def log(self, step, metrics):
            before.update({name: value.clone() for name, value in model.state_dict().items()})

    with pytest.raises(TrainingStopped) as caught:
        TrainingRun(model, Poisoned(), TinyData(settings), settings, store, hooks=Watch()).run()
    assert "stopped at step 8, before its update" in str(caught.value)
    assert "step-00000005" in str(caught.value)
    assert same_weights(dict(model.state_dict()), before)
    assert store.newest().step == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 10.0])
def test_a_bad_validation_loss_stops_before_it_is_kept(tmp_path, bad):
    class Spoiled(BaselineObjective):
        calls = 0

        def loss(self, model, batch):
            self.calls += not torch.is_grad_enabled()
            factor = bad if self.calls == 2 and not torch.is_grad_enabled() else 1.0
            return super().loss(model, batch) * factor

    settings, store, hooks = tiny_settings(checkpoint_every=4), tiny_store(tmp_path, "gpt"), Recorder()
    with pytest.raises(TrainingStopped, match=r"stopped after step 8: the validation loss is .*good.*step-00000004: lower"):
        TrainingRun(tiny_model("gpt"), Spoiled(), TinyData(settings), settings, store, hooks=hooks).run()
    assert store.steps() == [4] and 8 not in hooks.lines
    assert [row[0] for row in store.newest().state["progress"]["curve"]] == [4]


def test_the_update_is_skipped_on_the_device_once_a_loss_was_bad():
    """What protects the weights on a GPU, where the host learns of a bad loss only at the next log line."""
    from dpar_core.training.meters import Guard

    model = tiny_model("gpt")
    optimizer = adamw(model.named_parameters(), OptimSettings(lr=1e-2))
    guard, data = Guard(9.0, torch.device("cpu")), TinyData(tiny_settings())
    weights = []
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        loss = BaselineObjective().loss(model, data.micro_batch(step, 0)) * factor
        loss.backward()
        guard.look(step, loss.detach(), torch.tensor(1.0))
        optimizer.grad_scale, optimizer.found_inf = None, guard.bad
        optimizer.step()
        optimizer.zero_grad()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert same_weights(weights[0], weights[1]) and same_weights(weights[0], weights[2])
    assert guard.read().step == 1 and guard.read().loss == float("inf")


def test_a_full_disk_at_checkpoint_time_names_the_last_good_one(tmp_path, monkeypatch):
    store = tiny_store(tmp_path, "gpt")
    settings = tiny_settings()
    whole = store._write_model

    def full(path, step, model):
        if step > 5:
            raise OSError(28, "No space left on device")
        whole(path, step, model)

    monkeypatch.setattr(store, "_write_model", full)
    with pytest.raises(CheckpointError, match=r"step 10 could not be written.*No space left.*step-00000005"):
        TrainingRun(tiny_model("gpt"), BaselineObjective(), TinyData(settings), settings, store, hooks=Recorder()).run()
    assert store.newest().step == 5


def test_what_a_run_reports(tmp_path):
    progress, _, hooks = tiny_run(tmp_path, "dpar", log_every=4, snapshot_steps=(6,))
    assert sorted(hooks.lines) == [4, 8, 12]
    line = hooks.lines[8]
    assert set(line) == {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "validation/loss",
        "patch/mean_length",
        "perf/images_per_s",
        "perf/tokens_per_s",
        "perf/patches_per_s",
        "perf/step_time",
        "perf/data_wait",
        "perf/memory_gb",
        "perf/mfu",
    }
    assert all(math.isfinite(value) for value in line.values())
    assert 1 < line["patch/mean_length"] < 16 / 5
    assert line["perf/tokens_per_s"] == pytest.approx(16 * line["perf/images_per_s"])
    assert 0 <= line["perf/data_wait"] <= 1 and 0 < line["perf/mfu"] < 1
    assert hooks.checkpoints == [5, 10, 12]
    assert [row[0] for row in progress.timings] == [4, 8, 12]
    assert tiny_store(tmp_path, "dpar").snapshot_file(6).is_file()


def test_a_peak_from_a_busy_start_is_measured_again_at_a_validation(tmp_path, monkeypatch):
    """Otherwise a network seems to use more of the machine than there is."""
    monkeypatch.setattr(loop, "PEAK_SECONDS", 0.0)
    monkeypatch.setattr(loop, "peak_flops", lambda device, *, bf16, again=False: 1e15 if again else 1e6)
    hooks = tiny_run(tmp_path, "gpt", log_every=4)[2]
    assert hooks.lines[4]["perf/mfu"] > 1 > hooks.lines[8]["perf/mfu"]


def test_validation_time_and_checkpoints_do_not_count_as_training(tmp_path, monkeypatch):
    spent = [0.0]

    class Slow(TinyData):
        def validation(self):
            spent[0] += 1e6
            yield from super().validation()

    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + spent[0]))

    settings = tiny_settings(steps=4, validate_every=2)
    progress = TrainingRun(
        tiny_model("gpt"), BaselineObjective(), Slow(settings), settings, tiny_store(tmp_path, "gpt"), hooks=Recorder()
    ).run()
    assert spent[0] >= 2e6 and progress.seconds < 1e6


def test_neither_the_rank_nor_history_decides_the_dropout_of_a_step():
    from dpar_core.training.loop import stream_seed

    names = itertools.product((0, 1), range(50), (0, 1), (0, 1))  # seed, step, micro-batch, rank
    seeds = {stream_seed(*name) for name in names}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)


def test_prefetched_batches_come_in_order_and_errors_come_through():
    def make(step, micro):
        if step == 4:
            raise ValueError("shard 3 is short")
        return Batch(torch.tensor([[step, micro]]))

    with Prefetcher(make, first=2, last=9, micros=2, device=torch.device("cpu")) as batches:
        for step in (2, 3):
            assert [batch.tokens.tolist() for batch in batches.next()] == [[[step, 0]], [[step, 1]]]
        with pytest.raises(ValueError, match="shard 3 is short"):
            batches.next()


def test_leaving_the_prefetcher_stops_its_thread():
    with Prefetcher(lambda s, m: Batch(torch.zeros(1, 1)), first=0, last=10**9, micros=1, device=torch.device("cpu")):
        pass
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_learning_rate_warms_up_then_stays_or_falls():
    constant = OptimSettings(lr=1.0, warmup_steps=4)
    assert [learning_rate(constant, step, steps=10) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = OptimSettings(lr=1.0, warmup_steps=2, lr_schedule="cosine")
    rates = [learning_rate(cosine, step, steps=10) for step in range(11)]
    assert rates[2] == 1.0 and rates[6] == pytest.approx(0.5) and rates[10] == pytest.approx(0.0)
    assert learning_rate(OptimSettings(lr=1.0), 0, steps=10) == 1.0


def test_only_tensors_of_two_or_more_dimensions_decay():
    optimizer = adamw(tiny_model("gpt").named_parameters(), OptimSettings(lr=1.0, weight_decay=0.05))
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.05 and {p.dim() for p in decayed["params"]} == {2}
    assert plain["weight_decay"] == 0.0 and {p.dim() for p in plain["params"]} == {1}
    assert all("norm" in name for name in plain["param_names"]) and "tok_embeddings.weight" in decayed["param_names"]


B, L, XL, XXL = (768, 12, (1, 8, 3)), (1024, 16, (1, 19, 4)), (1280, 20, (1, 30, 5)), (1536, 24, (1, 41, 6))
TABLE = [
    (B, 16, 142, 52.34, 39.98),
    (L, 16, 142, 172.87, 117.19),
    (XL, 16, 142, 397.28, 257.70),
    (XXL, 16, 142, 728.00, 462.26),
    (B, 24, 280, 124.57, 88.44),
    (L, 24, 280, 407.08, 249.99),
    (XL, 24, 280, 927.86, 540.42),
    (XXL, 24, 280, 1692.35, 960.76),
]


@pytest.mark.parametrize(("size", "grid", "patches", "baseline", "dpar"), TABLE)
def test_forward_flops_are_those_of_the_published_table(size, grid, patches, baseline, dpar):
    width, heads, (encoder, patch, decoder) = size
    gpt = GPTConfig(16384, grid, width, heads, encoder + patch + decoder, num_classes=1000)
    own = DPARConfig(16384, grid, width, heads, encoder, patch, decoder, num_classes=1000)
    assert round(flops.gpt_forward_flops(gpt) / 1e9, 2) == baseline
    assert round(flops.dpar_forward_flops(own, patches) / 1e9, 2) == dpar


def test_the_formula_counts_what_the_tiny_models_multiply():
    """PyTorch's own counter agrees on the linear layers of the baseline."""
    from torch.utils.flop_counter import FlopCounterMode

    model, data = tiny_model("gpt"), TinyData(tiny_settings())
    batch = data.micro_batch(0, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        BaselineObjective().loss(model, batch)
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 4 * 16**2 * GPT_CONFIG.width * GPT_CONFIG.layers
    assert linear == 8 * (flops.gpt_forward_flops(GPT_CONFIG) - attention)


def test_known_gpus_have_a_published_peak():
    names = {
        "NVIDIA H200": 989,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835,
        "h100": 989,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA L4": 121,
        "NVIDIA L40S": 362,
        "NVIDIA A10": 125,
    }
    assert {name: flops.published_peak(name) for name in names} == {name: peak * 1e12 for name, peak in names.items()}


OTHER_GPUS = ["some cpu", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
OTHER_GPUS += ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"]


@pytest.mark.parametrize("name", OTHER_GPUS)
def test_a_gpu_whose_name_only_contains_a_known_one_has_none(name):
    assert flops.published_peak(name) is None
    assert flops.published_memory(name) is None


def test_memory_is_what_a_name_states():
    names = {"NVIDIA A100-SXM4-40GB": 40, "A100": 80, "NVIDIA H100 80GB HBM3": 80, "NVIDIA L4": 24}
    assert {name: flops.published_memory(name) for name in names} == {name: size * 1e9 for name, size in names.items()}

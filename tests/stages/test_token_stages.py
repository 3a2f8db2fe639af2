"""tokenize_images, entropies and patch_maps: what they write, that it is always the same, and that they go on."""

import csv
import json
import re
import shutil
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dpar_core.data.shards import TokenShards
from dpar_core.files import save_weights
from dpar_core.models.gpt import entropies_of
from dpar_core.patches.maps import EntropyMaps, MadeBy, PatchMaps, rule_precision, write_summary
from dpar_core.patches.rule import PatchRule, starts_from_lengths
from stages import entropies, patch_maps, tokenize_images
from stages.tracker import NullTracker
from stages.workers.tasks import run_units
from tests.helpers.tiny_data import CODES, Project, copy_of, make_project, save_entropy_model, save_tokenizer, tiny_params

ALL = ("tokens", "tokens.json", "entropies", "patch_maps", "patch_maps.json", "lengths.csv")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    torch.set_num_threads(1)
    return make_project(tmp_path_factory.mktemp("project")).tokenize().entropies().patch_maps()


def test_entropies_are_those_of_each_view_alone(project):
    model, digest = entropies.load_entropy_model(project.root / "entropy_model.safetensors", None, "cpu")
    for split in ("train", "validation"):
        shards = TokenShards(project.root / "tokens", split)
        maps = EntropyMaps(project.root / "entropies", shards)
        assert maps.made_by.entropy_model == digest
        found = maps.all()
        assert found.dtype == np.float32 and np.isnan(found[:, 0]).all()
        for index in range(len(shards)):
            for view in range(2):
                tokens = torch.from_numpy(shards.tokens(np.array([index]), np.array([view])).astype(np.int64))
                expected = entropies_of(model, tokens)[0].numpy()
                assert np.allclose(found[2 * index + view, 1:], expected[1:], atol=1e-5)
        assert found[:, 1:].std() > 0.01


@pytest.mark.parametrize("rows", [2, 7, 16])
def test_neighbours_and_places_in_a_batch_never_change_an_entropy(project, rows):
    model, _ = entropies.load_entropy_model(project.root / "entropy_model.safetensors", None, "cpu")
    random = np.random.default_rng(rows)
    mine = torch.from_numpy(random.integers(0, CODES, 16))
    found = set()
    for place in range(rows):
        batch = torch.from_numpy(random.integers(0, CODES, (rows, 16)))
        batch[place] = mine
        found.add(entropies_of(model, batch)[place].numpy().tobytes())
    assert len(found) == 1


def test_entropies_of_a_lower_precision_say_so_and_how_many_tokens_change_sides(project, tmp_path, monkeypatch):
    # The tiny model's entropies lie in clusters, one per token, and some thresholds in the middle of them.
    monkeypatch.setattr(entropies, "MOST_MOVED", 0.2)
    other = copy_of(project, tmp_path / "other", entropies={"precision": "fp16"})
    shutil.copytree(project.root / "tokens", other.root / "tokens")
    other.entropies().patch_maps()
    summary = json.loads((other.root / "entropies" / "summary.json").read_text())
    assert summary["made_by"]["entropy_precision"] == summary["facts"]["precision"] == "fp16"
    assert 0 < summary["facts"]["moved_share"] < 0.2
    assert [rule_precision(one.root / "patch_maps" / "rule.json") for one in (other, project)] == ["fp16", "fp32"]
    shards = TokenShards(project.root / "tokens", "train")
    assert PatchMaps(other.root / "patch_maps", shards).made_by.precision == "fp16"
    mine, exact = (EntropyMaps(one.root / "entropies", shards).all()[:, 1:] for one in (other, project))
    assert 0 < np.abs(mine - exact).max() < 0.01
    name = "train-000001.parquet"
    shutil.copy(project.root / "entropies" / name, other.root / "entropies" / name)
    sign_again(other.root / "entropies")
    with pytest.raises(ValueError, match=r"were made with entropy model \w+ in fp32 on .* this run has \w+ in fp16"):
        EntropyMaps(other.root / "entropies", shards).all()


def test_entropies_beyond_what_a_precision_can_hold_are_refused(project, tmp_path):
    model, _ = entropies.load_entropy_model(project.root / "entropy_model.safetensors", None, "cpu")
    weights = model.state_dict()
    weights["output.weight"] = weights["output.weight"] * 1e6
    shards = TokenShards(project.root / "tokens", "train")
    file, meta = project.root / "entropy_model.safetensors", {"tokenizer": shards.meta.tokenizer}
    other = copy_of(project, tmp_path / "other", entropies={"precision": "fp16"})
    save_weights(other.root / file.name, weights, kind="gpt", config=asdict(model.config), meta=meta)
    shutil.copytree(project.root / "tokens", other.root / "tokens")
    with pytest.raises(ValueError, match=r"entropies.precision fp16 puts .* or gives no finite numbers: set it to fp32"):
        other.entropies()
    work = entropies.ShardEntropies(other.root / "tokens", other.root / file.name, other.params.entropies, tmp_path, "cpu")
    with pytest.raises(ValueError, match=r"in fp16 are not finite numbers: set entropies.precision to fp32"):
        work(entropies.plan_units([shards])[0])


def test_entropies_do_not_depend_on_how_shards_are_cut(project, tmp_path):
    other = copy_of(project, tmp_path / "other", tokenize_images={"shard_images": 3, "batch_size": 6}).tokenize().entropies()
    for split in ("train", "validation"):
        by_key = []
        for root in (project.root, other.root):
            shards = TokenShards(root / "tokens", split)
            found = EntropyMaps(root / "entropies", shards).all().reshape(len(shards), 2, -1)
            by_key.append({shards.key(i): found[i].tobytes() for i in range(len(shards))})
        assert by_key[0] == by_key[1]


def test_patch_lengths_follow_the_rule_and_belong_to_their_keys(project):
    for split in ("train", "validation"):
        shards = TokenShards(project.root / "tokens", split)
        maps = PatchMaps(project.root / "patch_maps", shards)
        found = EntropyMaps(project.root / "entropies", shards).all().reshape(len(shards), 2, -1)
        table = {}
        for name, _ in shards.shards():
            for row in pq.read_table(project.root / "patch_maps" / name.replace(".tar", ".parquet")).to_pylist():
                table[row["key"], row["view"]] = row["lengths"]
        assert len(table) == 2 * len(shards)
        for index in range(len(shards)):
            for view in range(2):
                starts, last = [], 0
                for t in range(16):
                    gate = t <= 1 or t % 4 == 0 or found[index, view, t] > np.float32(maps.rule.threshold)
                    last = t if gate else last
                    starts.append((t - last) % 4 == 0)
                lengths = maps.lengths(np.array([index]), np.array([view]))[0].tolist()
                assert np.array_equal(starts_from_lengths([lengths], 16)[0], starts)
                assert table[shards.key(index), view] == lengths


def test_the_threshold_is_measured_on_training_maps_and_written_out(project):
    rule = json.loads((project.root / "patch_maps" / "rule.json").read_text())
    metrics = json.loads((project.root / "patch_maps.json").read_text())
    assert rule["threshold_measured_on_maps"] == 28
    assert rule["rule"]["threshold"] == metrics["patch/threshold_nats"]
    assert abs(metrics["patch/mean_length"] - 1.8) < 0.09
    shards = TokenShards(project.root / "tokens", "train")
    maps = PatchMaps(project.root / "patch_maps", shards)
    lengths = maps.lengths(np.arange(14).repeat(2), np.tile([0, 1], 14))
    counts = [len(one) for one in lengths]
    assert metrics["patch/mean_length"] == pytest.approx(16 * 28 / sum(counts))
    assert metrics["patch/patches_per_image"] == pytest.approx(np.mean(counts))
    assert metrics["patch/patches_5_percent"] == pytest.approx(np.percentile(counts, 5))
    assert metrics["patch/patches_95_percent"] == pytest.approx(np.percentile(counts, 95))
    with open(project.root / "lengths.csv") as stream:
        rows = {int(row["length"]): int(row["train"]) for row in csv.DictReader(stream)}
    assert rows == {length: int((np.concatenate(lengths) == length).sum()) for length in rows}
    assert sum(rows.values()) == sum(counts)


def test_a_given_threshold_is_taken_as_it_is(project, tmp_path):
    other = copy_of(project, tmp_path / "other", patching={"threshold": 2.5, "target_mean_length": None})
    for name in ("tokens", "entropies"):
        shutil.copytree(project.root / name, other.root / name)
    other.patch_maps()
    rule = json.loads((other.root / "patch_maps" / "rule.json").read_text())
    assert rule["rule"]["threshold"] == 2.5 and rule["threshold_measured_on_maps"] == 0


def test_a_sample_of_entropies_is_of_all_views_and_always_the_same(project):
    maps = EntropyMaps(project.root / "entropies", TokenShards(project.root / "tokens", "train"))
    assert np.array_equal(maps.sample(10**6).entropies, maps.all(), equal_nan=True) and maps.sample(10**6).whole
    some = maps.sample(9)
    assert some.entropies.shape == (9, 16) and some.labels.shape == (9,) and not some.whole
    assert np.array_equal(some.entropies, maps.sample(9).entropies, equal_nan=True)
    views, every = maps.shards.meta.num_views, maps.all()
    half = maps.sample(len(every) // views).entropies  # every second map would be the same view of each image
    of_view = [
        sum(any(np.array_equal(row, one, equal_nan=True) for one in every[view::views]) for row in half) for view in (0, 1)
    ]
    assert views == 2 and all(0.2 * len(half) < count < len(half) for count in of_view)
    assert len(maps.sample(9, shards=2).entropies) == 9


def test_running_again_gives_the_same_bytes(project, tmp_path):
    other = copy_of(project, tmp_path / "other").tokenize().entropies().patch_maps()
    assert other.bytes(*ALL) == project.bytes(*ALL)


class StopAfter(NullTracker):
    """Stops the stage after some shards, as Ctrl-C would."""

    def __init__(self, shards: int) -> None:
        super().__init__()
        self.left = shards

    def _progress(self, *_):
        return self

    def advance(self, amount: int = 1, **values: float) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_interrupted_runs_go_on_and_end_with_the_same_bytes(project, tmp_path, monkeypatch):
    other = copy_of(project, tmp_path / "other")
    for stage in ("tokenize", "entropies", "patch_maps"):
        with pytest.raises(KeyboardInterrupt):
            getattr(other, stage)(StopAfter(2))
        getattr(other, stage)()
    assert other.bytes(*ALL) == project.bytes(*ALL)


def test_a_second_run_makes_only_what_is_missing(project, tmp_path, monkeypatch):
    other = copy_of(project, tmp_path / "other").tokenize().entropies().patch_maps()
    made = []
    for module, kind in ((tokenize_images, "ShardTokenizer"), (entropies, "ShardEntropies")):
        real = getattr(module, kind).__call__
        spy = lambda self, unit, real=real: (made.append(unit.name), real(self, unit))  # noqa: E731
        monkeypatch.setattr(getattr(module, kind), "__call__", spy)
    real_map = patch_maps.make_map
    monkeypatch.setattr(patch_maps, "make_map", lambda maps, name, *rest: (made.append(name), real_map(maps, name, *rest)))
    (other.work / "tokenize_images" / "train-000001.tar.json").unlink()
    (other.work / "entropies" / "validation-000000.parquet.json").unlink()
    (other.work / "patch_maps" / "train-000002.tar.json").unlink()
    other.tokenize().entropies().patch_maps()
    assert made == ["train-000001.tar", "validation-000000.parquet", "train-000002.tar"]
    assert other.bytes(*ALL) == project.bytes(*ALL)


def test_shards_of_another_tokenizer_are_refused(project, tmp_path):
    other = copy_of(project, tmp_path / "other")
    save_tokenizer(other.root / "tokenizer.safetensors", seed=1)
    other.tokenize()
    with pytest.raises(ValueError, match=r"was trained on tokens of tokenizer \w{16}, .*`dpar-cli run entropy_model`"):
        other.entropies()
    (other.root / "entropy_model.safetensors").unlink()
    other.entropies()
    shards = TokenShards(other.root / "tokens", "train")
    with pytest.raises(ValueError, match=r"was made with token shards \w{16}, but .* holds \w{16}: run `dpar-cli"):
        EntropyMaps(project.root / "entropies", shards)
    with pytest.raises(ValueError, match=r"was made with token shards .* run `dpar-cli run patch_maps`"):
        PatchMaps(project.root / "patch_maps", shards)


def sign_again(folder):
    """Give a folder's summary the digests of its files as they are now."""
    summary = json.loads((folder / "summary.json").read_text())
    write_summary(folder, summary["files"], made_by=MadeBy.read(summary["made_by"]))


def test_maps_of_another_entropy_model_are_refused(project, tmp_path):
    shards = TokenShards(project.root / "tokens", "train")
    with pytest.raises(ValueError, match=r"were made with entropy model \w{16}, this run has another: run `dpar-cli"):
        PatchMaps(project.root / "patch_maps", shards, entropy_model="another")
    other = copy_of(project, tmp_path / "other")
    save_entropy_model(other.root / "entropy_model.safetensors", shards.meta.tokenizer, seed=1)
    shutil.copytree(project.root / "tokens", other.root / "tokens")
    other.entropies()
    name = "train-000001.parquet"
    shutil.copy(other.root / "entropies" / name, tmp_path / name)
    mixed = tmp_path / "mixed"
    shutil.copytree(project.root / "entropies", mixed)
    shutil.copy(tmp_path / name, mixed / name)
    sign_again(mixed)
    with pytest.raises(ValueError, match=r"train-000001\.parquet were made with entropy model .* run `dvc repro -sf"):
        EntropyMaps(mixed, shards).all()


def test_entropies_in_another_order_than_the_index_are_refused(project, tmp_path):
    shards = TokenShards(project.root / "tokens", "train")
    name, part = shards.shards()[1]
    path = shutil.copytree(project.root / "entropies", tmp_path / "maps") / name.replace(".tar", ".parquet")
    table, keys = pq.read_table(path), shards.keys().to_pylist()[part]
    for order, words in (
        ([0, 1, 4, 3, 2, 5, 6, 7, 8, 9], f"map 2 is of view 0 of {keys[2]}, the index of {name} has view 0 of {keys[1]}"),
        ([0, 1, 2, 3, 4, 5, 7, 6, 8, 9], f"map 6 is of view 1 of {keys[3]}, the index of {name} has view 0 of {keys[3]}"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], f"holds 9 maps, {name} has 10"),
    ):
        pq.write_table(table.take(order), path)
        sign_again(tmp_path / "maps")
        with pytest.raises(ValueError, match=re.escape(words) + r".*: run `dpar-cli data check --repair`, or `dvc repro"):
            EntropyMaps(tmp_path / "maps", shards).shard(name)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_maps_are_refused_in_one_sentence(project, tmp_path, damage):
    folder = tmp_path / "maps"
    shutil.copytree(project.root / "patch_maps", folder)
    path = folder / "train.starts.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(content[:-1] if damage == "cut" else content)
    error = FileNotFoundError if damage == "gone" else ValueError
    with pytest.raises(error, match=r"train\.starts\.npy is (damaged .*|missing): run `dpar-cli data check --repair`"):
        PatchMaps(folder, TokenShards(project.root / "tokens", "train"))


def test_maps_far_away_are_read_as_those_here(project, tmp_path):
    import fsspec

    far = fsspec.filesystem("memory")
    for name in ("tokens", "entropies", "patch_maps"):
        far.put(str(project.root / name), f"/far/{name}", recursive=True)
    shards = TokenShards("memory://far/tokens", "train", cache=tmp_path)
    here = TokenShards(project.root / "tokens", "train")
    picks = np.array([3, 0, 13]), np.array([1, 0, 1])
    there = PatchMaps("memory://far/patch_maps", shards, cache=tmp_path)
    assert np.array_equal(there.starts(*picks), PatchMaps(project.root / "patch_maps", here).starts(*picks))
    assert np.array_equal(
        EntropyMaps("memory://far/entropies", shards, cache=tmp_path).all(),
        EntropyMaps(project.root / "entropies", here).all(),
        equal_nan=True,
    )


@pytest.mark.parametrize("rule", ["token", "static", "entropy"])
def test_other_patch_modes_make_maps_too(project, tmp_path, rule):
    measured = rule == "entropy"
    changes = {"mode": rule, "target_mean_length": 2.0 if measured else None, "max_patch_length": None, "threshold": None}
    other = copy_of(project, tmp_path / "other", patching=changes)
    for name in ("tokens", "entropies"):
        shutil.copytree(project.root / name, other.root / name)
    other.patch_maps()
    maps = PatchMaps(other.root / "patch_maps", TokenShards(other.root / "tokens", "train"))
    lengths = np.concatenate(maps.lengths(np.arange(14), np.zeros(14, int)))
    assert {"token": set(lengths) == {1}, "static": set(lengths) == {2}, "entropy": max(lengths) > 4}[rule]
    assert isinstance(maps.rule, PatchRule) and maps.rule.mode == rule


def test_shards_that_are_made_in_another_order_are_the_same_bytes(project, tmp_path, monkeypatch):
    for module in (tokenize_images, entropies, patch_maps):
        monkeypatch.setattr(module, "run_units", lambda units, *rest, **more: run_units(units[::-1], *rest, **more))
    other = copy_of(project, tmp_path / "other").tokenize().entropies().patch_maps()
    assert other.bytes(*ALL) == project.bytes(*ALL)


def test_who_computes_is_no_part_of_what_is_computed():
    for module, section in ((tokenize_images, "tokenize_images"), (entropies, "entropies")):
        found = []
        for workers in (0, 3):
            params = tiny_params(**{section: {"workers": workers}})
            chosen = {field: getattr(params, field) for field in module.Params.__dataclass_fields__}
            found.append(module.identity(module.Params(**chosen)))
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("made_by", "stored"),
    [
        (MadeBy("t", "m"), {"tokens": "t", "entropy_model": "m"}),
        (
            MadeBy("t", "m", "e", "fp16"),
            {"tokens": "t", "entropy_model": "m", "entropies": "e", "entropy_precision": "fp16"},
        ),
    ],
)
def test_what_maps_are_made_by_is_stored_as_it_always_was(made_by, stored):
    assert made_by.to_json() == stored and MadeBy.read(stored) == made_by
    with pytest.raises(TypeError):
        MadeBy.read({**stored, "manifest": "x"})

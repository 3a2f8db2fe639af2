"""What an interrupted stage goes on with: only what the same params and inputs made."""

import contextlib
import errno
import os
import shutil

import pytest
from ruamel.yaml import YAML

import pipeline.runner
from dpar_core.data.shards import TokenShards
from pipeline.runner import StageError, load_stage, run_stage
from stages.tokenize_images import ShardTokenizer
from stages.tracker import NullTracker
from tests.helpers.tiny_data import make_project, save_tokenizer

SHARDS = ["train-000000.tar", "train-000001.tar", "train-000002.tar", "validation-000000.tar"]


class Tokenizing:
    """A project whose tokenizing was interrupted after two of its four shards."""

    def __init__(self, root, monkeypatch) -> None:
        self.root, self.made, self.left = root, [], 2
        project = make_project(root)
        self.params = project.params.model_dump(mode="json")
        for name, target in (("manifest.parquet", "data"), ("tokenizer.safetensors", "tokenizer")):
            (root / "artifacts" / target).mkdir(parents=True)
            shutil.copy(root / name, root / "artifacts" / target / name)
        real = ShardTokenizer.__call__

        def call(tokenizer, shard):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            real(tokenizer, shard)
            self.made.append(shard.name)

        monkeypatch.setattr(ShardTokenizer, "__call__", call)
        monkeypatch.setattr(pipeline.runner, "open_tracker", lambda *_, **__: contextlib.nullcontext(NullTracker()))
        with pytest.raises(KeyboardInterrupt):
            self.run()
        assert self.made == SHARDS[:2]
        self.left = -1

    def run(self) -> list[str]:
        """Run the stage; return the shards made."""
        self.made.clear()
        YAML().dump(self.params, self.root / "params.yaml")
        run_stage("tokenize_images", root=self.root, params_file=self.root / "params.yaml")
        return self.made


@pytest.fixture
def tokenizing(tmp_path, monkeypatch):
    return Tokenizing(tmp_path, monkeypatch)


def test_the_same_params_and_inputs_go_on(tokenizing):
    assert tokenizing.run() == SHARDS[2:]


def test_params_that_the_stage_does_not_read_may_change_on_the_way(tokenizing):
    tokenizing.params["seed"] += 1
    assert tokenizing.run() == SHARDS[2:]


def test_changed_params_make_all_anew(tokenizing):
    tokenizing.params["data"]["views"] = "ten_crop_1.1"
    assert tokenizing.run() == SHARDS
    assert TokenShards(tokenizing.root / "artifacts" / "tokens", "train").meta.num_views == 10


def test_params_and_inputs_that_change_while_a_stage_runs_are_not_recorded_as_what_it_was_made_with(tokenizing):
    """DVC reads params.yaml and hashes inputs after the stage, and would call a result of the former ones up to date."""
    params, real = tokenizing.params, ShardTokenizer.__call__

    def edits(change):
        def call(tokenizer, shard):
            real(tokenizer, shard)
            change()

        return call

    def edited():
        YAML().dump({**params, "seed": 9, "data": {**params["data"], "views": "ten_crop_1.1"}}, root / "params.yaml")

    root, match = tokenizing.root, r"params.yaml changed while .* ran .data.views adm_center_flip -> ten_crop_1.1., so its"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardTokenizer, "__call__", edits(edited))
        with pytest.raises(StageError, match=match):
            tokenizing.run()
        shutil.rmtree(root / "artifacts" / "tokens")
        assert tokenizing.run() == []  # put back: what was made is there
        file = root / "artifacts" / "tokenizer" / "tokenizer.safetensors"
        params["tokenize_images"]["shard_images"] = 20
        patch.setattr(ShardTokenizer, "__call__", edits(lambda: save_tokenizer(file, seed=1)))
        with pytest.raises(StageError, match=r"what it reads changed while stage .* ran .tokenizer \w+ -> \w+."):
            tokenizing.run()


def test_what_a_worker_made_of_replaced_inputs_is_never_taken_for_what_the_former_ones_make(tokenizing, monkeypatch):
    """Workers open what they read when they begin, after the stage has named its work folder by what was there."""
    root, real = tokenizing.root, ShardTokenizer.__init__
    file = root / "artifacts" / "tokenizer" / "tokenizer.safetensors"
    assert tokenizing.run() == SHARDS[2:]
    right = [(root / "artifacts" / "tokens" / name).read_bytes() for name in SHARDS]
    former = file.read_bytes()

    def init(*args):
        save_tokenizer(file, seed=1)
        real(*args)

    for ends in (StageError, RuntimeError):  # by itself, and by an error of its own
        shutil.rmtree(root / "work")
        with monkeypatch.context() as patch:
            patch.setattr(ShardTokenizer, "__init__", init)
            if ends is RuntimeError:
                patch.setattr("stages.tokenize_images.publish", failing)
            with pytest.raises(ends):
                tokenizing.run()
        file.write_bytes(former)
        assert tokenizing.run() == SHARDS
        assert [(root / "artifacts" / "tokens" / name).read_bytes() for name in SHARDS] == right


def failing(*_, **__):
    raise RuntimeError("out of luck")


def test_a_killed_run_is_continued_only_on_the_files_that_it_read(tokenizing, capsys):
    work = next(one for one in (tokenizing.root / "work" / "tokenize_images").iterdir() if one.is_dir())
    inputs = load_stage("tokenize_images").bind(tokenizing.root)[0]
    for change in ("as it was", "touched"):
        pipeline.runner._begin("tokenize_images", work, pipeline.runner._signatures(inputs))  # and it is killed
        if change == "touched":
            save_tokenizer(inputs.tokenizer)
        assert tokenizing.run() == (SHARDS[2:] if change == "as it was" else SHARDS)
    said = capsys.readouterr().err
    assert "was replaced since a run of it was killed" in said and f"{work.name}-1 is not used" in said
    assert [one for one in work.parent.iterdir() if one.is_dir()] == [work]  # the stage has ended


@pytest.mark.parametrize("copy", [shutil.copy2, shutil.copy], ids=["as rsync -a and cp -a do", "with new times"])
def test_a_killed_run_is_continued_in_a_copy_of_the_project(tokenizing, tmp_path_factory, copy):
    inputs = load_stage("tokenize_images").bind(tokenizing.root)[0]
    work = next(one for one in (tokenizing.root / "work" / "tokenize_images").iterdir() if one.is_dir())
    pipeline.runner._begin("tokenize_images", work, pipeline.runner._signatures(inputs))  # and it is killed
    elsewhere = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(tokenizing.root, elsewhere, copy_function=copy)
    tokenizing.root = elsewhere
    assert tokenizing.run() == SHARDS[2:]


def test_what_a_killed_run_made_of_replaced_inputs_is_set_aside_each_time(tmp_path, capsys):
    work = tmp_path / "work" / "train_dpar" / "0123"
    for number in range(3):
        pipeline.runner._begin("train_dpar", work, {"tokens": str(number)})
        (work / f"step-{number}").write_text("days of work")
    left = sorted(str(path.relative_to(work.parent)) for path in work.parent.rglob("*"))
    assert left == ["0123", "0123-1", "0123-1/step-0", "0123-2", "0123-2/step-1", "0123/reading.json", "0123/step-2"]
    assert f"what is in {work}-2 is not used, and removed when the stage has ended" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_killed_run_is_continued_though_a_restart_gave_its_files_other_devices_and_inodes(tokenizing, monkeypatch):
    inputs, known = load_stage("tokenize_images").bind(tokenizing.root)[0], pipeline.runner.signature
    seen = pipeline.runner._signatures(inputs)
    monkeypatch.setattr(pipeline.runner, "signature", lambda status: " ".join(["7", "7", *known(status).split()[2:]]))
    assert seen and pipeline.runner._signatures(inputs) == seen


def test_a_folder_of_outputs_that_cannot_be_written_stops_a_stage_before_its_work(tokenizing, monkeypatch):
    def refused(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(pipeline.runner.tempfile, "TemporaryFile", refused)
    with pytest.raises(OSError, match=r"Read-only file system: .*artifacts"):
        tokenizing.run()
    assert tokenizing.made == []


def test_another_tokenizer_makes_all_anew(tokenizing):
    file = save_tokenizer(tokenizing.root / "artifacts" / "tokenizer" / "tokenizer.safetensors", seed=1)
    assert tokenizing.run() == SHARDS
    first = TokenShards(tokenizing.root / "artifacts" / "tokens", "train").tokens([0], [0])
    save_tokenizer(file, seed=0)
    assert tokenizing.run() == SHARDS
    assert (TokenShards(tokenizing.root / "artifacts" / "tokens", "train").tokens([0], [0]) != first).any()


def test_other_images_make_all_anew(tokenizing):
    other = make_project(tokenizing.root / "other")
    (tokenizing.root / "other" / "images" / "train" / "a" / "000.png").unlink()
    shutil.copy(other.data().root / "manifest.parquet", tokenizing.root / "artifacts" / "data" / "manifest.parquet")
    assert tokenizing.run() == SHARDS

"""Every reader of files that come from outside or carry a digest, with a file to begin from and what may be mutated.

A reader may accept a file, or refuse it by an error that the program's edge has a sentence for. Where the file carries a
digest, what is accepted has to be what was written.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import unittest.mock
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpar_core.files import save_weights, sha256_file, write_record
from tests.fuzz import mutate
from tests.fuzz.mutate import BLIND, SYNTAX, Mutation
from tests.helpers.tiny_data import photo

Files = dict[str, tuple[Mutation, ...]]  # what may be mutated, by name, and how
IMAGES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
SOLUTION, SYNSETS = "LOC_val_solution.csv", "n01440764"


@dataclass(frozen=True)
class Target:
    """A reader. make: writes its files into a folder; read: returns what is read, as data that can be compared.

    files: those that are mutated. sealed: whether a digest covers them. slow: over 10 ms an input. older: what may be read
    in place of what was damaged, made by a call before the damage. named: whether a refusal names the file; where it does
    not, the reader's callers do.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: Files
    sealed: bool = False
    slow: bool = False
    older: Callable[[Path], Any] | None = None
    named: bool = True


def words(value: Any) -> str:
    """Return a digest of whatever a reader returned."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hash(value.tobytes())}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{hash(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}"
    if isinstance(value, dict):
        return (
            "{"
            + ",".join(f"{name!r}:{words(one)}" for name, one in sorted(value.items(), key=lambda one: str(one[0])))
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(words, value)) + "]"
    return repr(value)


def encoded(kind: str, number: int = 1) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(number)).save(stream, kind)
    return stream.getvalue()


def tar(path: Path, content: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


# Images and archives of images -----------------------------------------------------------------------------------------


def _images(kind: str) -> Target:
    name = f"a.{kind}"

    def make(folder: Path) -> None:
        (folder / name).write_bytes(encoded(IMAGES[kind]))

    def read(folder: Path) -> Any:
        from dpar_core.data.images import read_image

        return read_image(folder / name)

    return Target(f"image {kind}", make, read, {name: (*BLIND, mutate.in_png) if kind == "png" else BLIND}, named=False)


def _ilsvrc_train(folder: Path) -> None:
    inner: dict[str, bytes] = {}
    for number, synset in enumerate(("n01440764", "n01443537")):
        tar(folder / "inner.tar", {f"{synset}_{number}.JPEG": encoded("JPEG", number)})
        inner[f"{synset}.tar"] = (folder / "inner.tar").read_bytes()
    (folder / "inner.tar").unlink()
    tar(folder / "train.tar", inner)


def _read_ilsvrc_train(folder: Path) -> Any:
    from dpar_core.data.image_tars import list_ilsvrc_train

    found = list_ilsvrc_train(folder / "train.tar")
    return [found.keys, found.sources, found.labels, found.classes]


def _ilsvrc_validation(folder: Path) -> None:
    names = [f"ILSVRC2012_val_{number:08d}" for number in (1, 2)]
    tar(folder / "val.tar", {f"{name}.JPEG": encoded("JPEG", 1) for name in names})
    with open(folder / SOLUTION, "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows([name, "n01440764 1 2 3 4"] for name in names)


def _read_ilsvrc_validation(folder: Path) -> Any:
    from dpar_core.data.image_tars import list_ilsvrc_validation
    from stages.synset_lists import validation_synsets

    found = list_ilsvrc_validation(folder / "val.tar", validation_synsets)
    return [found.keys, found.sources, found.labels]


def _webdataset(folder: Path) -> None:
    content: dict[str, bytes] = {}
    for number in range(3):
        content |= {f"{number:03d}.jpg": encoded("JPEG", number), f"{number:03d}.cls": str(number % 2).encode()}
        content[f"{number:03d}.json"] = json.dumps({"label": number % 2}).encode()
    tar(folder / "train" / "000.tar", content)


def _open_all(folder: Path, listing: Any) -> list[Any]:
    from dpar_core.data.images import BadImage
    from dpar_core.data.manifest import Row
    from dpar_core.data.sources import ImageOpener

    opener, found = ImageOpener({"train": str(folder)}, {}), []
    for key, source in zip(listing.keys, listing.sources):
        try:
            found.append(opener(Row(key, "train", source, None, 0, "")))
        except BadImage as error:  # which is counted, and left out
            found.append(str(error))
    return found


def _read_webdataset(folder: Path) -> Any:
    from dpar_core.data.image_tars import list_webdataset

    listing = list_webdataset(folder / "train", "train", label_key="cls")
    return [listing.labels, _open_all(folder / "train", listing)]


def _parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([{"bytes": encoded("PNG", n), "path": f"{n}.png"} for n in range(3)])
    table = pa.table({"image": images, "label": pa.array([0, 1, 0])})
    features = {"info": {"features": {"label": {"names": ["ape", "bee"], "_type": "ClassLabel"}}}}
    (folder / "train").mkdir()
    schema = table.schema.with_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table.cast(schema), folder / "train" / "a.parquet", row_group_size=2)


def _read_parquet(folder: Path) -> Any:
    from dpar_core.data.image_parquet import list_parquet

    listing = list_parquet(folder / "train", "train")
    return [listing.labels, listing.classes, _open_all(folder / "train", listing)]


# What stages hand to each other ----------------------------------------------------------------------------------------


def _tokens(folder: Path) -> None:
    from tests.helpers.tiny_shards import write_maps, write_tokens

    write_tokens(folder / "tokens", train=6, validation=2)
    write_maps(folder / "maps", folder / "tokens")


def _read_tokens(folder: Path) -> Any:
    from dpar_core.data.shards import TokenShards

    shards = TokenShards(folder / "tokens", "train")
    everything = [shards.all_views(index) for index in range(len(shards))]
    return [everything, shards.labels, shards.keys().to_pylist(), asdict(shards.meta)]


def _read_maps(folder: Path) -> Any:
    from dpar_core.data.shards import TokenShards
    from dpar_core.patches.maps import PatchMaps

    maps = PatchMaps(folder / "maps", TokenShards(folder / "tokens", "train"))
    return [maps.starts(np.arange(6), np.zeros(6, int)), asdict(maps.rule), maps.made_by.entropy_model]


def _entropies(folder: Path) -> None:
    from dpar_core.data.shards import TokenShards
    from dpar_core.patches.maps import MadeBy, parquet_name, write_entropies, write_summary

    _tokens(folder)
    shards, files = TokenShards(folder / "tokens", "train"), []
    (folder / "entropies").mkdir()
    for name, part in shards.shards():
        values = np.random.default_rng(3).random((2 * (part.stop - part.start), shards.meta.tokens)).astype(np.float32)
        files.append(parquet_name(name))
        write_entropies(folder / "entropies" / files[-1], shards, part, values, entropy_model="e" * 16)
    write_summary(folder / "entropies", files, made_by=MadeBy(shards.digest, "e" * 16))


def _read_entropies(folder: Path) -> Any:
    from dpar_core.data.shards import TokenShards
    from dpar_core.patches.maps import EntropyMaps

    return EntropyMaps(folder / "entropies", TokenShards(folder / "tokens", "train")).all()


def _manifest(folder: Path, contents: str | None = "0123") -> None:
    from dpar_core.data.manifest import Manifest, Row, write_manifest

    names = [None] * 4 if contents is None else [one * 16 for one in contents]
    box = (0, 1, 8, 9)
    rows = [
        Row(f"train-{n:03d}", "train", f"train:{n}.png", box if n else None, n % 2, "ab"[n % 2], names[n]) for n in range(4)
    ]
    write_manifest(folder / "manifest.parquet", Manifest.of(rows, ("a", "b"), roots={"train": "x"}))


def _read_manifest(folder: Path) -> Any:
    from dpar_core.data.manifest import read_manifest

    found = read_manifest(folder / "manifest.parquet")
    return [[asdict(row) for row in found.rows], found.classes, found.roots, found.notes]


def _rule(folder: Path) -> None:
    from dpar_core.patches.maps import MadeBy, write_rule
    from dpar_core.patches.rule import PatchRule

    write_rule(folder / "rule.json", PatchRule("entropy_rows", 4, 1.8, 4), made_by=MadeBy("0" * 16, "e" * 16))


def _read_rule(folder: Path) -> Any:
    from dpar_core.patches.maps import read_rule

    return asdict(read_rule(folder / "rule.json", entropy_model="e" * 16))


def _weights(folder: Path) -> None:
    state = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_weights(folder / "w.safetensors", state, kind="gpt", config={"width": 4}, meta={"tokenizer": "t"})


def _read_weights(folder: Path) -> Any:
    from dpar_core.files import load_weights

    found = load_weights(folder / "w.safetensors", kind="gpt")
    return [found.state, found.config, found.meta]


def _checkpoints(folder: Path) -> None:
    store = _store(folder)
    for step in (1, 2):
        weights = {"w": torch.full((3,), float(step))}
        store.save(step, model=weights, optimizer={"exp_avg/w": weights["w"]}, state={"progress": {"step": step}}, score=1.0)


def _store(folder: Path) -> Any:
    from dpar_core.training.checkpoint import Architecture, CheckpointStore

    return CheckpointStore(folder / "run", Architecture("gpt", {"width": 4}), keep_last=2, warn=lambda sentence: None)


def _read_checkpoints(folder: Path) -> Any:
    return _state(_store(folder).newest())


def _older_checkpoint(folder: Path) -> Any:
    return _state(_store(folder).read(1))


def _state(found: Any) -> Any:
    return None if found is None else [found.step, found.state, found.model(), found.optimizer()]


def _unit(folder: Path) -> None:
    from stages.workers.tasks import finish_unit

    (folder / "a.npz").write_bytes(b"something")
    finish_unit(folder, "a", ["a.npz"], count=3)


def _read_unit(folder: Path) -> Any:
    from stages.workers.tasks import finished_unit

    return finished_unit(folder, "a")


def _samples(folder: Path) -> None:
    from dpar_core.evaluation.sample_files import write_samples

    pixels = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    write_samples(folder / "samples.npz", [pixels], np.array([0, 1, 2, 0]))


def _read_samples(folder: Path) -> Any:
    from dpar_core.evaluation.sample_files import read_samples

    return list(read_samples(folder / "samples.npz"))


def _statistics(folder: Path) -> None:
    covariance = np.eye(4)
    np.savez(folder / "reference.npz", mu=np.zeros(4), sigma=covariance, mu_s=np.zeros(3), sigma_s=np.eye(3))


def _read_statistics(folder: Path) -> Any:
    from dpar_core.evaluation.reference import reference_of_file

    found = reference_of_file(folder / "reference.npz", SimpleNamespace(digest="0" * 16), None, cache=folder)  # type: ignore[arg-type]
    return [found.pool.mean, found.pool.covariance]


def _scores(folder: Path) -> None:
    from dpar_core.evaluation.protocol import Interval, Protocol, Scores

    names = {one: (3 if kind == "int" else "x") for one, kind in Protocol.__annotations__.items()}
    protocol = Protocol(**{**names, "formats": ("png",)})
    scores = Scores({"eval/fid": 2.0}, {"eval/fid": Interval(1.0, 3.0)}, protocol, {"images": 3}, 64)
    write_record(folder / "scores.json", scores.to_json())


def _read_scores(folder: Path) -> Any:
    from dpar_core.evaluation.protocol import read_scores

    return read_scores(folder / "scores.json").to_json()


def _training(folder: Path) -> None:
    from dpar_core.models.gpt import GPTConfig

    config = asdict(GPTConfig(16, 4, 16, 1, 1, ffn_multiple=16))
    save_weights(folder / "model.safetensors", {"w": torch.ones(1)}, kind="gpt", config=config, meta={})
    (folder / "curve.csv").write_text("step,train/loss,validation/loss\n1,2.5,2.6\n2,2.4,2.5\n")
    rows = [{"step": step, "seconds": 1.0 * step, "images_per_s": 3.0} for step in (1, 2)]
    digest = sha256_file(folder / "curve.csv")
    write_record(folder / "timings.json", {"seconds": 2.0, "images_per_s": 3.0, "curve": rows, "curve_sha256": digest})


def _read_training(folder: Path) -> Any:
    from pipeline.report.facts import read_training

    return asdict(read_training(folder))


def _journal(folder: Path) -> None:
    from pipeline.tracking.journal import Journal

    journal = Journal(folder / "tracking", "train")
    journal.write("run", "r", {"name": "n", "tags": {}, "parent": None, "once": False})
    journal.write("metrics", "r", {"values": {"loss": 1.0}, "step": 3})
    journal.write("params", "r", {"lr": "1"})
    journal.close()
    journal.folder.rename(folder / "journal")
    (folder / "journal" / "sent.json").write_text(json.dumps({"values": 0, "artifacts": 0, "refused": []}))


def _read_journal(folder: Path) -> Any:
    from pipeline.tracking.journal import Reader, bury
    from pipeline.tracking.outbox import _batches, _read_progress

    bury(folder / "journal")
    progress = _read_progress(folder / "journal")
    events = Reader(folder / "journal").after(progress.values)
    return [len(batch) for lane in (False, True) for batch, _ in _batches(events, artifacts=lane)]


# Files that users name -------------------------------------------------------------------------------------------------


def _params(folder: Path) -> None:
    from tests.helpers.paths import ROOT

    shutil.copy(ROOT / "params" / "smoke.yaml", folder / "params.yaml")


def _read_params(folder: Path) -> Any:
    from stages.params import load_params

    return load_params(folder / "params.yaml").model_dump()


STATE = {"layer.weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)}


def _torch_file(folder: Path) -> None:
    torch.save({"model": STATE, "epoch": 3}, folder / "w.pt")


def _old_torch_file(folder: Path) -> None:
    torch.save({"model": STATE}, folder / "w.pt", _use_new_zipfile_serialization=False)


def _foreign_safetensors(folder: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(STATE, folder / "w.safetensors")


def _read_checkpoint(name: str, folder: Path) -> Any:
    from dpar_core.models.weights import read_checkpoint

    return read_checkpoint(folder / name).state


def _script(folder: Path) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output(x)

    torch.jit.save(torch.jit.script(Network()), str(folder / "n.pt"))


def _read_script(folder: Path) -> Any:
    from dpar_core.evaluation import features

    with unittest.mock.patch.object(features.subprocess, "run", partial(forked, folder)):
        return sorted(name for name, _ in features.load_script(folder / "n.pt", "cpu").named_parameters())


def _kit(folder: Path) -> None:
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O")]
    rows = np.array([(number + 1, f"n{number:08d}") for number in range(3)], dtype=kind)
    savemat(folder / "meta.mat", {"synsets": rows})


def forked(folder: Path, words: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the program of `python -c` in a forked process; a new one would take a second for each input."""
    with open(folder / "said", "wb") as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            place = words.index("-c")
            status, program = 1, words[place + 1].replace("2 << 30", "1 << 40")  # the limit of this process holds
            try:
                sys.argv, sys.stdout = words[place:], os.fdopen(1, "w")
                sys.argv.pop(1)
                exec(program, {})
                sys.stdout.flush()
                status = 0
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess(words, code, (folder / "said").read_bytes(), (folder / "said").read_bytes())


def _read_kit(folder: Path) -> Any:
    from stages import synset_lists

    with unittest.mock.patch.object(synset_lists.subprocess, "run", partial(forked, folder)):
        return synset_lists._development_kit(folder / "meta.mat")


JSON: tuple[Mutation, ...] = (*SYNTAX, mutate.json_values, mutate.json_values, mutate.deep)
ZIP: tuple[Mutation, ...] = (*BLIND, mutate.in_zip(BLIND), mutate.in_zip(BLIND))
TAR: tuple[Mutation, ...] = (*BLIND, mutate.in_tar, mutate.in_tar)
SAFETENSORS: tuple[Mutation, ...] = (*BLIND, mutate.in_safetensors, mutate.in_safetensors)
CSV: tuple[Mutation, ...] = (*BLIND, mutate.csv_cells)

TARGETS = {
    target.name: target
    for target in (
        *map(_images, IMAGES),
        Target("ILSVRC training tar", _ilsvrc_train, _read_ilsvrc_train, {"train.tar": TAR}),
        Target("ILSVRC validation", _ilsvrc_validation, _read_ilsvrc_validation, {"val.tar": TAR, SOLUTION: CSV}),
        Target("webdataset", _webdataset, _read_webdataset, {"train/000.tar": TAR}),
        Target("Parquet of images", _parquet, _read_parquet, {"train/a.parquet": BLIND}),
        Target("manifest", _manifest, _read_manifest, {"manifest.parquet": BLIND}, sealed=True),
        Target(
            "manifest without contents",  # as version 0.1.0 wrote them
            partial(_manifest, contents=None),
            _read_manifest,
            {"manifest.parquet": BLIND},
            sealed=True,
        ),
        Target(
            "token shards",
            _tokens,
            _read_tokens,
            {"tokens/train-000000.tar": TAR, "tokens/index.arrow": BLIND, "tokens/summary.json": JSON},
            sealed=True,
        ),
        Target(
            "entropies",
            _entropies,
            _read_entropies,
            {"entropies/train-000000.parquet": BLIND, "entropies/summary.json": JSON},
            sealed=True,
        ),
        Target(
            "patch maps",
            _tokens,
            _read_maps,
            {"maps/train.starts.npy": BLIND, "maps/rule.json": JSON, "maps/summary.json": JSON},
            sealed=True,
        ),
        Target("rule", _rule, _read_rule, {"rule.json": JSON}, sealed=True),
        Target("weights", _weights, _read_weights, {"w.safetensors": SAFETENSORS}, sealed=True),
        Target(
            "checkpoints",
            _checkpoints,
            _read_checkpoints,
            {
                "run/step-00000002/state.json": JSON,
                "run/step-00000002/model.safetensors": SAFETENSORS,
                "run/step-00000002/optimizer.safetensors": SAFETENSORS,
            },
            sealed=True,
            older=_older_checkpoint,
        ),
        Target("unit of work", _unit, _read_unit, {"a.json": JSON, "a.npz": BLIND}, sealed=True, older=lambda folder: None),
        Target("samples", _samples, _read_samples, {"samples.npz": ZIP}),
        Target("statistics of a reference", _statistics, _read_statistics, {"reference.npz": ZIP}),
        Target("scores", _scores, _read_scores, {"scores.json": JSON}, sealed=True),
        Target(
            "training of a report",
            _training,
            _read_training,
            {"curve.csv": CSV, "timings.json": JSON, "model.safetensors": SAFETENSORS},
            sealed=True,
        ),
        Target("journal of tracking", _journal, _read_journal, {"journal/events.jsonl": SYNTAX, "journal/sent.json": JSON}),
        Target(
            "params", _params, _read_params, {"params.yaml": (*SYNTAX, *[mutate.yaml_values] * 8, mutate.deep)}, slow=True
        ),
        Target("checkpoint of PyTorch", _torch_file, partial(_read_checkpoint, "w.pt"), {"w.pt": ZIP}),
        Target("old checkpoint of PyTorch", _old_torch_file, partial(_read_checkpoint, "w.pt"), {"w.pt": BLIND}),
        Target(
            "foreign safetensors",
            _foreign_safetensors,
            partial(_read_checkpoint, "w.safetensors"),
            {"w.safetensors": SAFETENSORS},
        ),
        Target("TorchScript", _script, _read_script, {"n.pt": ZIP}, slow=True),
        Target("meta.mat", _kit, _read_kit, {"meta.mat": BLIND}, slow=True),
    )
}

"""Are shards, index, entropies and maps what their digests say? What is missing or damaged, and making just that again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dpar_core.data.images import BadImage, views
from dpar_core.data.manifest import SPLITS, Manifest, read_manifest
from dpar_core.data.remote import Folder
from dpar_core.data.shards import INDEX, SUMMARY, ShardsSummary, TokenShards, read_summary, scan_shard, write_index
from dpar_core.files import sha256_file, write_json
from dpar_core.patches.maps import (
    RULE,
    EntropyMaps,
    MapsSummary,
    join_starts,
    parquet_name,
    read_rule,
    starts_name,
    write_rule,
)
from dpar_core.patches.maps import read_summary as read_maps_summary
from stages import artifacts as catalog
from stages import entropies, patch_maps, tokenize_images
from stages import params as P
from stages.data import ManifestOpener
from stages.tokenize_images import BAD_IMAGES, BOTH_SPLITS
from stages.tracker import NullTracker, Tracker

Content = TypeVar("Content")


@dataclass(frozen=True)
class Problem:
    """Something wrong with an artifact.

    file: below artifacts/.
    what: a sentence.
    folder: whose file it is, for repairs.
    repairable: whether that file alone can be made again.
    expected: the digest it must then have, None where none is known.
    """

    file: str
    what: str
    folder: str = ""
    repairable: bool = False
    expected: str | None = None

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


@dataclass(frozen=True)
class DataReport:
    """What a check found. files, bytes: how much was read."""

    problems: tuple[Problem, ...]
    files: int
    bytes: int


class Artifacts:
    """The paths of everything that belongs to a data set."""

    def __init__(self, artifacts: Path) -> None:
        self.root = artifacts
        self.manifest, self.tokenizer = catalog.MANIFEST.below(artifacts), catalog.TOKENIZER.below(artifacts)
        self.tokens, self.entropy_model = catalog.TOKENS.below(artifacts), catalog.ENTROPY_MODEL.below(artifacts)
        self.entropies, self.patch_maps = catalog.ENTROPIES.below(artifacts), catalog.PATCH_MAPS.below(artifacts)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def check_data(artifacts: Path, tracker: Tracker | None = None) -> DataReport:
    """Read everything there is and compare it with its digests, and what belongs together with each other."""
    paths = Artifacts(artifacts)
    problems: list[Problem] = []
    wanted: list[tuple[str, Path, str]] = []  # folder, file, digest
    manifest = _open(problems, paths, paths.manifest, lambda: _whole_manifest(paths.manifest))
    summary = _open(problems, paths, paths.tokens / SUMMARY, lambda: read_summary(Folder(paths.tokens)))
    made: dict[str, MapsSummary | None] = {}
    for folder, stage in ((paths.entropies, "entropies"), (paths.patch_maps, "patch_maps")):
        made[stage] = _open(problems, paths, folder / SUMMARY, partial(read_maps_summary, folder, stage=stage))
    if summary:
        wanted += [("tokens", paths.tokens / one.name, one.sha256) for one in summary.shards]
        wanted.append(("tokens", paths.tokens / INDEX, summary.index_sha256))
        known = {path.name for _, path, _ in wanted} | {SUMMARY, BAD_IMAGES, BOTH_SPLITS}
        problems += _strangers(paths, paths.tokens, known)
        problems += _bad_images(paths, manifest, summary)
    for stage, content in made.items():
        if content:
            folder = artifacts / stage
            wanted += [(stage, folder / name, digest) for name, digest in content.files.items()]
            problems += _strangers(paths, folder, {*content.files, SUMMARY})
    read = _compare(wanted, paths, problems, tracker or NullTracker())
    weights = {
        path: _open(problems, paths, path, partial(_weights_digest, path)) for path in (paths.tokenizer, paths.entropy_model)
    }
    problems += _relations(paths, manifest, summary, made, weights)
    return DataReport(tuple(problems), len(wanted), read)


def _open(problems: list[Problem], paths: Artifacts, path: Path, read: Callable[[], Content]) -> Content | None:
    try:
        return read()
    except FileNotFoundError as error:
        problems.append(Problem(paths.name(path), f"is missing: {error}"))
    except OSError as error:
        problems.append(Problem(paths.name(path), f"is damaged: {error.strerror or error}"))
    except ValueError as error:
        problems.append(Problem(paths.name(path), f"cannot be used: {error}"))
    return None


def _whole_manifest(path: Path) -> Manifest:
    found = read_manifest(path)
    if Manifest.of(found.rows, found.classes).digest != found.digest:
        raise ValueError("its rows are not those its digest names: run `dvc repro -sf data`")
    return found


def _strangers(paths: Artifacts, folder: Path, known: set[str]) -> Iterator[Problem]:
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            yield Problem(paths.name(path), "does not belong there: remove it")


def _bad_images(paths: Artifacts, manifest: Manifest | None, summary: ShardsSummary) -> Iterator[Problem]:
    """Yield what is wrong with the list of images that have no tokens. It has no digest: its form and count are known."""
    path = paths.tokens / BAD_IMAGES
    try:
        listed = json.loads(path.read_bytes())
        if not isinstance(listed, list):
            raise TypeError
        keys = {tokenize_images.Bad(**one).key for one in listed}
        if manifest is None or manifest.digest != summary.meta.manifest:
            return
        lacking = len(manifest.rows) - summary.samples
        if len(keys) == lacking:
            return
        what = f"is damaged: it lists {len(keys)} images, the shards lack {lacking}"
    except FileNotFoundError:
        what = "is missing"
    except OSError as error:
        what = f"is damaged: {error.strerror or error}"
    except (ValueError, TypeError):
        what = "is damaged: expected a list of images, each with key, source and reason"
    yield Problem(paths.name(path), what, "tokens", repairable=True)


def _compare(wanted: list[tuple[str, Path, str]], paths: Artifacts, problems: list[Problem], tracker: Tracker) -> int:
    """Read every file wanted; add those that are missing or have another digest to the problems; return bytes read."""
    sizes = [_size(path) for _, path, _ in wanted]

    def digest(path: Path) -> tuple[str | None, str]:
        """Return a file's digest, or None and what is wrong with the file."""
        try:
            return sha256_file(path), ""
        except FileNotFoundError:
            return None, "is missing"
        except OSError as error:
            return None, f"is damaged: {error.strerror or error}"

    with tracker.progress(sum(sizes), "data check", unit="bytes") as progress:
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            found = pool.map(digest, [path for _, path, _ in wanted])
            for (folder, path, expected), size, (one, wrong) in zip(wanted, sizes, found):
                progress.advance(size)
                if one != expected:
                    what = wrong or f"is damaged (digest {str(one)[:16]}, expected {expected[:16]})"
                    problems.append(Problem(paths.name(path), what, folder, repairable=True, expected=expected))
    return sum(sizes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # the read that follows says why


def _relations(
    paths: Artifacts,
    manifest: Manifest | None,
    summary: ShardsSummary | None,
    made: Mapping[str, MapsSummary | None],
    weights: dict[Path, str | None],
) -> Iterator[Problem]:
    """Yield what was made from something else than what is there now."""

    def compare(path: Path, of: str, found: str, now: str | None, stage: str) -> Iterator[Problem]:
        if now is not None and found != now:
            yield Problem(paths.name(path), f"was made with {of} {found}, there is {now} now: run `dpar-cli run {stage}`")

    if summary:
        meta, tokens = summary.meta, paths.tokens / SUMMARY
        yield from compare(tokens, "manifest", meta.manifest, manifest.digest if manifest else None, "tokenize_images")
        yield from compare(tokens, "tokenizer", meta.tokenizer, weights[paths.tokenizer], "tokenize_images")
    for stage, content in made.items():
        if content:
            path, made_by = paths.root / stage / SUMMARY, content.made_by
            yield from compare(path, "token shards", made_by.tokens, summary.digest if summary else None, stage)
            model = weights[paths.entropy_model]
            yield from compare(path, "entropy model", made_by.entropy_model, model, stage)
            if made_by.entropies is not None and (now := made["entropies"]):
                yield from compare(path, "entropies", made_by.entropies, now.digest, stage)


def _weights_digest(path: Path) -> str | None:
    return sha256_file(path)[:16] if path.exists() else None


def repair_data(
    artifacts: Path, params: P.Params, *, device: str, work: Path, tracker: Tracker
) -> tuple[list[str], DataReport]:
    """Make what is missing or damaged again, and nothing else.

    Returns the files that were mended, and a new check of everything. A file is put in place only when it has the very
    digest that the rest was made with. Raises ValueError when it comes out differently, or what it is made from is gone.
    """
    report, paths, mended = check_data(artifacts, tracker), Artifacts(artifacts), []
    shutil.rmtree(work, ignore_errors=True)
    for stage, make in (("tokens", _tokens), ("entropies", _entropies), ("patch_maps", _maps)):
        broken = {Path(one.file).name: one for one in report.problems if one.folder == stage and one.repairable}
        if not broken:
            continue
        folder = work / stage
        folder.mkdir(parents=True, exist_ok=True)
        with tracker.progress(len(broken), f"repair {stage}", unit="files") as progress:
            for name in make(paths, params, broken, folder, device):
                expected, digest = broken[name].expected, sha256_file(folder / name)
                if expected is not None and expected != digest:
                    remedy = "tokenize_images" if stage == "tokens" else stage
                    raise ValueError(
                        f"{broken[name].file}: made again, it has digest {digest[:16]}, expected "
                        f"{expected[:16]}: its images, params, device or library versions are others now; "
                        f"run `dvc repro -sf {remedy}`"
                    )
                _put(folder / name, artifacts / stage / name)
                mended.append(broken[name].file)
                progress.advance(1)
    shutil.rmtree(work, ignore_errors=True)
    return mended, check_data(artifacts, tracker)


def _put(source: Path, target: Path) -> None:
    if target.is_dir():
        raise ValueError(f"{target} is a folder, expected a file: remove it, then repair again")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_dev != target.parent.stat().st_dev:
        copy = target.parent / f".{target.name}.repair.tmp"
        shutil.copyfile(source, copy)
        source = copy
    os.replace(source, target)


def _tokens(paths: Artifacts, params: P.Params, broken: dict[str, Any], work: Path, device: str) -> Iterator[str]:
    summary = read_summary(Folder(paths.tokens))
    shards = [name for name in broken if name not in (INDEX, BAD_IMAGES)]
    if shards or BAD_IMAGES in broken:
        chosen = tokenize_images.Params(params.data, params.tokenize_images)
        inputs = tokenize_images.Inputs(paths.manifest, paths.tokenizer)
        manifest = read_manifest(paths.manifest)
        now = tokenize_images.token_meta(manifest, paths.tokenizer, chosen)
        if now != summary.meta:
            raise ValueError(
                f"{paths.tokens} was made with other params, images or tokenizer than there are now: "
                "run `dpar-cli run tokenize_images`"
            )
        plan = {shard.name: shard for shard in tokenize_images.plan_shards(manifest, params.tokenize_images.shard_images)}
    if shards:
        make = tokenize_images.ShardTokenizer(inputs, chosen, work, device, Path.cwd(), 2)
        for name in shards:
            if name not in plan:
                raise ValueError(
                    f"{paths.tokens} has {name}, which shards of {params.tokenize_images.shard_images} images have not: "
                    "run `dpar-cli run tokenize_images`"
                )
            make(plan[name])
            yield name
    if INDEX in broken:
        listed = [(one.name, one.split) for one in summary.shards]
        contents = [scan_shard(paths.tokens / name, summary.meta) for name, _ in listed]
        write_index(work, summary.meta, listed, contents=contents)
        yield INDEX
    if BAD_IMAGES in broken:
        there = {key for split in SPLITS for key in TokenShards(paths.tokens, split).keys().to_pylist()}
        bad = _try_again(manifest, plan.values(), there, params.data)
        write_json(work / BAD_IMAGES, [asdict(one) for one in bad])
        yield BAD_IMAGES


def _try_again(
    manifest: Manifest, plan: Iterable[tokenize_images.Shard], there: set[str], data: P.Data
) -> Iterator[tokenize_images.Bad]:
    """Yield every image that is not in the shards (`there`: their keys), in order, and why it could not be used."""
    opener = ManifestOpener(manifest)
    for shard in plan:
        for row in manifest.rows.take(shard.indices):
            if row.key in there:
                continue
            try:
                views(opener(row), data.image_size, data.views)
            except BadImage as error:
                yield tokenize_images.Bad(row.key, row.source, str(error))
            else:
                raise ValueError(
                    f"image {row.source} can be used now, but has no tokens: run `dvc repro -sf tokenize_images`"
                )


def _entropies(paths: Artifacts, params: P.Params, broken: dict[str, Any], work: Path, device: str) -> Iterator[str]:
    make = entropies.ShardEntropies(paths.tokens, paths.entropy_model, params.entropies, work, device)
    if read_maps_summary(paths.entropies, stage="entropies").made_by != make.made_by():
        raise ValueError(
            f"{paths.entropies} was made with other tokens, another model or precision: run `dpar-cli run entropies`"
        )
    for unit in entropies.plan_units([make.shards[split] for split in SPLITS]):
        if unit.name in broken:
            make(unit)
            yield unit.name


def _maps(paths: Artifacts, params: P.Params, broken: dict[str, Any], work: Path, device: str) -> Iterator[str]:
    made_by = read_maps_summary(paths.patch_maps, stage="patch_maps").made_by
    maps = {split: EntropyMaps(paths.entropies, TokenShards(paths.tokens, split)) for split in SPLITS}
    train = maps["train"]
    if made_by != train.maps_made_by():
        raise ValueError(f"{paths.patch_maps} was made with other tokens or entropies: run `dpar-cli run patch_maps`")
    if RULE in broken:
        rule, measured_on = patch_maps.make_rule(params.patching, train)
        write_rule(work / RULE, rule, made_by=made_by, facts={"threshold_measured_on_maps": measured_on})
        yield RULE
    rule = read_rule(paths.patch_maps / RULE)
    for split, one in maps.items():
        bits = starts_name(split) in broken
        for name, part in one.shards.shards():
            if bits or parquet_name(name) in broken:
                patch_maps.make_map(one, name, part, rule, work, made_by)
                if parquet_name(name) in broken:
                    yield parquet_name(name)
        if bits:
            meta, parts = one.shards.meta, [work / f"{name}.starts.npy" for name, _ in one.shards.shards()]
            join_starts(work / starts_name(split), parts, maps=(len(one.shards), meta.num_views, -(-meta.tokens // 8)))
            yield starts_name(split)

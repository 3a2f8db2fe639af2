"""Work that is done shard by shard, in this process or by Ray actors, and goes on where an interrupted run stopped."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dpar_core.files import Damaged, read_record, sha256_file, write_record
from stages.workers.cluster import connected, local_cpus, require

Unit = TypeVar("Unit")
_RESTARTS = 3  # times a lost actor comes back before the run gives up


class Worker(Protocol):
    """Makes one shard. It is built once a process, so that models are loaded once."""

    def __call__(self, unit: Unit) -> None:
        """Make a shard and put it whole into the work folder."""


def make_shards(
    units: Sequence[Unit], build: Callable[[int], Worker], *, workers: int, device: str, section: str
) -> Iterator[Unit]:
    """Make every shard of `units`, in any order; yield each when it is done.

    build: makes a worker, given the threads it may use; with workers > 0 it travels to that many Ray actors, each with a
    GPU where device is cuda, so it must be picklable and its paths absolute and shared by all machines. section: of
    params.yaml, for sentences. Raises what a worker raised, ValueError when the cluster cannot hold the workers.
    """
    if not units:
        return
    if not workers:
        worker = build(local_cpus())
        for unit in units:
            worker(unit)
            yield unit
        return
    with connected() as nodes:
        gpus = 1 if device == "cuda" else 0
        require(nodes, workers=workers, cpus=1, gpus=gpus, section=section)
        threads = max(int(sum(node.cpus for node in nodes)) // workers, 1)
        yield from _by_actors(units, build, workers=min(workers, len(units)), threads=threads, gpus=gpus)


def _by_actors(
    units: Sequence[Unit], build: Callable[[int], Worker], *, workers: int, threads: int, gpus: int
) -> Iterator[Unit]:
    import ray

    class Actor:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(threads)
            self.worker = build(threads)

        def make(self, unit: Unit) -> None:
            self.worker(unit)

    kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(Actor)
    actors = [kind.remote() for _ in range(workers)]
    waiting, busy = list(reversed(units)), {}
    for actor in actors:
        unit = waiting.pop()
        busy[actor.make.remote(unit)] = actor, unit
    try:
        while busy:
            (done,), _ = ray.wait(list(busy), num_returns=1)
            actor, unit = busy.pop(done)
            _raise_what_it_raised(done)
            yield unit
            if waiting:
                unit = waiting.pop()
                busy[actor.make.remote(unit)] = actor, unit
    finally:
        for actor in actors:
            ray.kill(actor)


def _raise_what_it_raised(reference: Any) -> None:
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else RuntimeError(str(error))) from None
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(
            f"a worker was lost {_RESTARTS + 1} times ({str(error).splitlines()[0]}): run the same command again, it goes on"
        ) from None


def finish_unit(work: Path, name: str, files: Iterable[str], **facts: Any) -> None:
    """Record in the work folder that a unit of work is done, with the digests of its files. facts: JSON data about it."""
    digests = {file: sha256_file(work / file) for file in files}
    write_record(work / f"{name}.json", {"unit": name, "files": digests, "facts": facts})


def finished_unit(work: Path, name: str) -> dict[str, Any] | None:
    """Return the facts of a unit that an earlier run finished, or None when it has to be made.

    A record or a file that was damaged since is named in one line on stderr, and its unit counts as not made.
    """
    record = work / f"{name}.json"
    if not record.exists():
        return None
    again = "it is made again"
    try:
        found = read_record(record, way_out=again)
        if found.get("unit") != name:
            raise Damaged(f"{record} is of {found.get('unit')}, expected {name}: {again}")
        files, facts = found.get("files"), found.get("facts")
        if not isinstance(files, dict) or not isinstance(facts, dict):
            raise Damaged(f"{record} is of another version: {again}")
        for file, expected in files.items():
            if not (work / file).exists():
                raise Damaged(f"{work / file} is missing: {again}")
            if (digest := sha256_file(work / file)) != expected:
                raise Damaged(f"{work / file} is damaged (digest {digest[:16]}, expected {str(expected)[:16]}): {again}")
    except Damaged as error:
        print(error, file=sys.stderr, flush=True)
        return None
    return facts


def facts_of_unit(work: Path, name: str) -> dict[str, Any]:
    """Return the facts of a unit that this run has finished. Raises Damaged, FileNotFoundError."""
    return read_record(work / f"{name}.json", way_out="run the same command again, it is made again")["facts"]


def place(source: Path, target: Path) -> None:
    """Put a finished file where it is published, without a second copy where the file system allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove_leftovers(work: Path, *outputs: Path) -> None:
    """Remove what killed runs left half written in the work folder and beside the outputs. Nobody else may be at work."""
    half = list(work.glob(".*.tmp"))
    for output in outputs:
        half += [path for ending in ("tmp", "old") for path in output.parent.glob(f".{output.name}.*.{ending}")]
    for path in half:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

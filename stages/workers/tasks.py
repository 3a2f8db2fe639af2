"""Work that is done shard by shard, in this process or by Ray actors, and goes on where an interrupted run stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from dpar_core.files import sha256_file
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


def _raise_what_it_raised(reference) -> None:
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


def is_whole(path: Path, sha256: str) -> bool:
    """Tell whether a file of an earlier run is there and still what was written."""
    return path.exists() and sha256_file(path) == sha256


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

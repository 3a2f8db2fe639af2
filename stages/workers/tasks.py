"""The one way to run units of work: in this process or on Ray actors, going on where an interrupted run stopped."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from dpar_core.files import Damaged, read_record, remove, sha256_file, write_record
from dpar_core.system import cpus
from stages.terminal import note
from stages.workers.cluster import Node, connected, expected, living_nodes, require

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Kept = TypeVar("Kept")
Worker = Callable[[Unit], Result]  # does one unit; it is built once per process, so that models are loaded once
_RESTARTS = 3  # times a lost actor comes back before the run gives up
_LOOK_SECONDS = 5.0  # without a result, after which the machines of the cluster are looked at
_PATIENCE = 60.0  # seconds until it is reported that no worker has begun


def run_units(
    units: Sequence[Unit],
    build: Callable[[int], Worker[Unit, Result]],
    *,
    section: str,
    workers: int = 0,
    device: str = "cpu",
    at_once: int = 1,
    check: Callable[[list[Node]], None] = lambda nodes: None,
) -> Iterator[tuple[Unit, Result]]:
    """Do every unit of work, in any order; yield each with its result when it is done.

    build: makes a worker, given the threads it may use; with workers > 0 it travels to that many Ray actors, so it must be
        picklable and its paths absolute and shared by all machines.
    section: of params.yaml, for sentences.
    workers: actors, each with its share of the CPUs, and a GPU where device is cuda; 0: in this process.
    at_once: threads of this process that share the worker, where there are no actors.
    check: called with the nodes of the cluster before anything starts, raises when the work does not suit them.

    Raises the error of a worker, ValueError when the cluster cannot hold the workers, RuntimeError when one is lost again
    and again.
    """
    if not units:
        return
    if not workers:
        worker = build(cpus())
        if at_once == 1:
            yield from ((unit, worker(unit)) for unit in units)
        else:
            with ThreadPoolExecutor(at_once) as pool:
                yield from zip(units, pool.map(worker, units))
        return
    gpus = 1 if device.startswith("cuda") else 0
    if (own := expected()) is not None:  # what has no room here is refused before Ray starts
        require(own, workers=workers, cpus=1, gpus=gpus, section=section)
    import ray

    with connected() as nodes:
        require(nodes, workers=workers, cpus=1, gpus=gpus, section=section)
        check(nodes)
        share = int(sum(node.cpus for node in nodes)) // workers
        fitting = (n for n in range(share, 1, -1) if sum(node.fits(cpus=n, gpus=gpus) for node in nodes) >= workers)
        threads = next(fitting, 1)

        class Actor:
            worker: Worker[Unit, Result] | None = None

            def begin(self) -> None:
                """Shows that there was room for this actor."""

            def work_on(self, unit: Unit) -> Result:
                if self.worker is None:  # not in __init__, of whose errors Ray hands on the text alone
                    import torch

                    torch.set_num_threads(threads)
                    self.worker = build(threads)
                return self.worker(unit)

        kind = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(Actor)
        waiting = list(reversed(range(len(units))))
        actors = [kind.remote() for _ in range(min(workers, len(units)))]
        begun, patient_until = [actor.begin.remote() for actor in actors], time.monotonic() + _PATIENCE
        busy: dict[Any, tuple[Any, int]] = {}
        free, missing = list(actors), {*waiting}

        def room() -> int:
            return min(sum(node.fits(cpus=threads, gpus=gpus) for node in living_nodes()), len(actors))

        before = room()
        try:
            while missing:
                while waiting and free:
                    if (number := waiting.pop()) in missing:
                        actor = free.pop()
                        busy[actor.work_on.remote(units[number])] = actor, number
                done, _ = ray.wait(list(busy), num_returns=1, timeout=_LOOK_SECONDS)
                if not done:
                    if begun and time.monotonic() > patient_until:
                        if not ray.wait(begun, timeout=0)[0]:
                            note(
                                f"no worker has begun after {_PATIENCE:g} s: others use the Ray cluster, or its workers are "
                                "still starting; it goes on when there is room, Ctrl-C stops it"
                            )
                        begun = []
                    if (now := room()) < before:
                        _say_lost(now, len(actors))
                    before = now
                    if now < len(actors) and not waiting:  # what a lost actor had others do as well: it may never come back
                        at_work = [number for _, number in busy.values()]
                        waiting += [number for number in at_work if number in missing and at_work.count(number) == 1]
                    continue
                actor, number = busy.pop(done[0])
                free.append(actor)
                result = _result_of(done[0])
                if number in missing:
                    missing.remove(number)
                    yield units[number], result
        finally:
            for actor in actors:
                ray.kill(actor)


def _say_lost(room: int, workers: int) -> None:
    then = "they do the work of the lost ones as well" if room else "it goes on by itself when a machine joins"
    note(f"a machine of the Ray cluster was lost, it has room for {room} of {workers} workers now: {then}; Ctrl-C stops it")


def _result_of(reference: Any) -> Any:
    """Return what a worker returned, or raise its error without what Ray wraps around it."""
    import ray

    try:
        return ray.get(reference)
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
        note(error)
        return None
    return facts


def facts_of_unit(work: Path, name: str) -> dict[str, Any]:
    """Return the facts of a unit that this run has finished. Raises Damaged, FileNotFoundError."""
    record = read_record(work / f"{name}.json", way_out="run the same command again, it is made again")
    facts: dict[str, Any] = record["facts"]
    return facts


def move_into_place(source: Path, target: Path) -> None:
    """Put a finished file where it is published, without a second copy where the file system allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove_leftovers(work: Path, *outputs: Path) -> None:
    """Remove what killed runs left half written in the work folder and beside the outputs. Nobody else may be at work."""
    half = [path for ending in ("tmp", "old") for path in work.rglob(f".*.{ending}")]
    for output in outputs:
        half += [path for ending in ("tmp", "old") for path in output.parent.glob(f".{output.name}.*.{ending}")]
    for path in half:
        remove(path)


class KeptLast(Generic[Kept]):
    """What a process keeps of one kind, as networks in memory: the newest alone, made when its key is asked for first."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self.value: Kept | None = None

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return what `make` gave for this key; what was kept for another one is freed before."""
        if self.value is None or self._key != key:
            self.value = None
            self.value, self._key = make(), key
        return self.value

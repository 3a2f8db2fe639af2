"""Mutated files, one after the other, given to a reader in a process with limited memory and time.

The i-th input of a target is a function of (seed, target, i). The process is forked from one that has imported everything;
where it dies or hangs, the input it was at is a finding, and the next process goes on behind it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import mmap
import os
import resource
import select
import shutil
import signal
import struct
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.targets import TARGETS, Target, words

HANG_SECONDS = 20.0
MEMORY = 1 << 30  # bytes beyond what the process has at its start
SLOW_SECONDS = 120.0  # for readers that start a process of their own


@dataclass
class Found:
    """What became of the inputs of a target. findings: (input, what), worst: seconds of the slowest input."""

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    peak: int = 0
    findings: list[tuple[int, str]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


def mutated(target: Target, originals: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes, str]:
    """Return (file, content, mutation) of an input."""
    entropy = hashlib.sha256(f"{seed}-{target.name}-{number}".encode()).digest()
    dice = np.random.default_rng(list(struct.unpack("<8I", entropy)))
    names = list(target.files)
    name = names[int(dice.integers(len(names)))]
    mutations = target.files[name]
    mutation = mutations[int(dice.integers(len(mutations)))]
    return name, mutation(originals[name], dice), mutation.__name__


def fuzz(target: Target, root: Path, *, seed: int, first: int = 0, count: int, budget: float = 1e9) -> Found:
    """Give `count` inputs to a reader, or as many as take `budget` seconds."""
    found = Found(target.name)
    base, folder = root / "base", root / "work"
    shutil.rmtree(root, ignore_errors=True)
    base.mkdir(parents=True)
    target.make(base)
    began, at = time.monotonic(), first
    while at < first + count and time.monotonic() - began < budget:
        at = _batch(target, base, folder, found, seed=seed, at=at, end=first + count, until=began + budget)
    found.seconds = time.monotonic() - began
    return found


def _batch(target: Target, base: Path, folder: Path, found: Found, *, seed: int, at: int, end: int, until: float) -> int:
    """Run inputs in a process until it is through, dies or hangs; return the next input's number."""
    shared = mmap.mmap(-1, 64)  # the number of the input at work
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            _work(target, base, folder, shared, writing, seed=seed, at=at, end=end, until=until)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    os.close(writing)
    limit = SLOW_SECONDS if target.slow else HANG_SECONDS
    said, seen, since, hung = b"", at, time.monotonic(), False
    while True:
        ready, _, _ = select.select([reading], [], [], 0.2)
        if ready:
            if not (piece := os.read(reading, 1 << 16)):
                break
            said += piece
        now = int.from_bytes(shared[:8], "little")
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > limit:
            hung = True
            os.kill(child, signal.SIGKILL)
            break
    os.close(reading)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    for line in said.decode(errors="replace").splitlines():
        verdict, _, text = line.partition("\t")
        found.inputs += 1
        if verdict == "accepted":
            found.accepted += 1
        elif verdict == "refused":
            found.refused += 1
        elif verdict == "end":
            found.inputs -= 1
            worst, peak = text.split("\t")
            found.worst, found.peak = max(found.worst, float(worst)), max(found.peak, int(peak))
        else:
            number, _, what = text.partition("\t")
            found.findings.append((int(number), what))
            found.kinds[what[:80]] += 1
    last = int.from_bytes(shared[:8], "little")
    if code == 0:
        return last
    found.inputs += 1
    what = f"hung for {limit:g} s" if hung else f"the process died ({code})"
    found.findings.append((last, what))
    found.kinds[what] += 1
    return last + 1


def _work(
    target: Target, base: Path, folder: Path, shared: Any, writing: int, *, seed: int, at: int, end: int, until: float
) -> None:
    limit_memory(MEMORY)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    originals = {name: (base / name).read_bytes() for name in target.files}
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    before = {words(target.read(folder))}
    if target.older is not None:
        before.add(words(target.older(folder)))
    everything = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    os.chdir(folder)
    worst, number = 0.0, at
    for number in range(at, end):
        shared[:8] = number.to_bytes(8, "little")
        name, content, mutation = mutated(target, originals, seed, number)
        (folder / name).write_bytes(content)
        began = time.monotonic()
        line = judge(target, folder, name, content, originals, before, f"{number}\t{mutation} of {name}: ")
        worst = max(worst, time.monotonic() - began)
        os.write(writing, f"{line}\n".encode())
        (folder / name).write_bytes(originals[name])
        _restore(folder, everything)
        if time.monotonic() > until:
            break
    shared[:8] = (number + 1).to_bytes(8, "little")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.write(writing, f"end\t{worst:.3f}\t{peak}\n".encode())


def limit_memory(more: int) -> None:
    """Let this process have `more` bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _restore(folder: Path, everything: dict[str, bytes]) -> None:
    """Remove what a reader left, and bring back what it changed, as the journal's does."""
    present: dict[str, int] = {}
    for at, _, names in os.walk(folder):
        for path in (os.path.join(at, name) for name in names):
            if path in everything:
                present[path] = os.stat(path).st_size
            else:
                os.unlink(path)
    for path, content in everything.items():
        if present.get(path) != len(content):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_bytes(content)


def judge(
    target: Target, folder: Path, name: str, content: bytes, originals: dict[str, bytes], before: set[str], where: str
) -> str:
    """Return "accepted", "refused" or a finding, as one line."""
    from pipeline import boundary

    try:
        value = words(target.read(folder))
    except Exception as error:
        sentence = boundary._known(error)
        if sentence is None:
            return f"finding\t{where}{type(error).__name__}: {' '.join(str(error).split())[:160]} {_last_frame(error)}"
        if isinstance(error, MemoryError):
            return f"finding\t{where}memory ran out {_last_frame(error)}"
        names = (str(folder), *filter(None, (Path(name).name, Path(name).parent.name)))
        if target.named and not any(one in sentence for one in names):
            return f"finding\t{where}the sentence names no file: {sentence[:200]}"
        return "refused"
    unsealed = name.endswith(".json") and b'"digest"' not in content  # as files of 0.1.0, which are still read
    if target.sealed and value not in before and not unsealed and not _resealed(where):
        return f"finding\t{where}damage was accepted"
    return "accepted"


def _resealed(where: str) -> bool:
    return "json_values" in where or "in_safetensors" in where


def _last_frame(error: BaseException) -> str:
    frames = [
        one
        for one in traceback.extract_tb(error.__traceback__)
        if "/dpar_core/" in one.filename or "/stages/" in one.filename or "/pipeline/" in one.filename
    ]
    return f"({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""


def reproduce(name: str, root: Path, *, seed: int, number: int) -> None:
    """Read one input in this process, with its traceback; the file stays in root/base."""
    target = TARGETS[name]
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    target.make(root)
    originals = {file: (root / file).read_bytes() for file in target.files}
    file, content, mutation = mutated(target, originals, seed, number)
    (root / file).write_bytes(content)
    print(f"{mutation} of {root / file}", flush=True)
    print(target.read(root))


def warm() -> None:
    """Import and run every reader once, so that forked processes need not; leave nothing that grows."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    gc.collect()

"""Fuzz every reader.

    python -m tests.fuzz [--count 10000] [--seed 1] [--targets rule,weights] [--out findings.txt]
    python -m tests.fuzz --show "rule" 1234 [--seed 1]     one input again, with its traceback

Readers that take over 10 ms an input get a tenth of the count. Exit 1 when there are findings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--targets", default="")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds per target")
    parser.add_argument("--show", nargs=2, metavar=("TARGET", "NUMBER"))
    options = parser.parse_args()
    # In memory where the system has such a folder: each input is a file, and a disk that others use takes 10 ms for one.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="dpar-fuzz-", dir=memory))
    os.environ |= {"OMP_NUM_THREADS": "1", "DPAR_CACHE": str(root / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    from tests.fuzz.run import fuzz, reproduce, warm
    from tests.fuzz.targets import TARGETS

    if options.show:
        reproduce(options.show[0], root / "show", seed=options.seed, number=int(options.show[1]))
        return
    warm()
    names = options.targets.split(",") if options.targets else list(TARGETS)
    total = 0
    print("| reader | inputs | accepted | refused | findings | slowest, s | s |\n|---|---|---|---|---|---|---|", flush=True)
    try:
        for name in names:
            target = TARGETS[name]
            count = max(options.count // 10, 1) if target.slow else options.count
            found = fuzz(target, root / "fuzz", seed=options.seed, first=options.first, count=count, budget=options.budget)
            total += len(found.findings)
            print(
                f"| {name} | {found.inputs} | {found.accepted} | {found.refused} | {len(found.findings)} | "
                f"{found.worst:.2f} | {found.seconds:.0f} |",
                flush=True,
            )
            for what, times in found.kinds.most_common(12):
                example = next(number for number, text in found.findings if text.startswith(what))
                whole = next(text for number, text in found.findings if number == example)
                print(f"    {times} x, input {example}: {whole[:330]}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()

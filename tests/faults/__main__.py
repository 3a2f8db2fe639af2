"""Inject faults and print what came of each.

    python -m tests.faults --count 300 --seed 1 [--first 0] [--kinds kill,disk] [--folder DIR] [--out faults.jsonl]

Exit 1 when a fault left anything but the undisturbed bytes, or broke another promise (harness.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults import nodes, processes
from tests.faults.shares import SHARES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="index of the first fault")
    parser.add_argument("--kinds", default="", help="only these kinds, separated by commas")
    parser.add_argument("--stages", default="", help="only these stages: with each, what it needs, in order")
    parser.add_argument("--out", type=Path, help="JSON lines of all outcomes")
    parser.add_argument("--keep", action="store_true", help="stop at the first problem and keep the project")
    parser.add_argument("--verbose", action="store_true", help="show all that a disturbed stage said")
    options = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script ignores it for what it starts in the background
    root = Path(tempfile.mkdtemp(prefix="dpar-faults-"))
    os.environ |= {"OMP_NUM_THREADS": "1", "DPAR_CACHE": str(root / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    kinds = tuple(options.kinds.split(",")) if options.kinds else tuple(SHARES)
    if "nodes" in kinds and (why := nodes.why_not()) is not None:
        print(f"faults of the kind `nodes` are skipped: {why}", flush=True)
        kinds = tuple(kind for kind in kinds if kind != "nodes")
        if not kinds:
            sys.exit(0)
    from pipeline.runner import STAGES

    stages = options.stages.split(",") if options.stages else list(STAGES)
    processes.import_everything(stages, mlflow=bool({"mlflow", "beside"} & {*kinds}))
    processes.adopt_orphans()
    from tests.faults.harness import Harness, as_json
    from tests.faults.plan import fault
    from tests.faults.project import World

    world = World(root)
    kept, harness = False, None
    outcomes = []
    try:
        world.make(stages, lambda line: print(line, flush=True))
        harness = Harness(world, root / "project")
        for index in range(options.first, options.first + options.count):
            outcome = harness.apply(fault(world, options.seed, index, kinds=kinds))
            outcomes.append(outcome)
            mark = "FAIL" if outcome.problems else "ok"
            print(
                f"{mark:4} {index:4} {outcome.stage:15} {outcome.kind:10} {outcome.what} -> {outcome.effect} "
                f"({outcome.seconds:.1f} s) {outcome.said}",
                flush=True,
            )
            if options.verbose:
                print(outcome.whole)
            for problem in outcome.problems:
                print(f"     {problem}", flush=True)
            if options.out:
                with open(options.out, "a") as stream:
                    stream.write(as_json(outcome) + "\n")
            if outcome.problems and options.keep:
                kept = True
                print(f"kept in {root}")
                break
    finally:
        if harness is not None:
            harness.close()
        if not kept:
            shutil.rmtree(root, ignore_errors=True)
    print(table(outcomes))
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(outcomes)} faults, {failed} with problems, {time.monotonic() - began:.0f} s")
    sys.exit(1 if failed else 0)


def table(outcomes: list) -> str:
    """Count effects by kind, as a table in Markdown."""
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    rows = ["| kind | faults | effects | problems |", "|---|---|---|---|"]
    for kind in kinds:
        mine = [outcome for outcome in outcomes if outcome.kind == kind]
        effects = Counter(outcome.effect for outcome in mine).most_common()
        words = ", ".join(f"{count} {effect}" for effect, count in effects)
        rows.append(f"| {kind} | {len(mine)} | {words} | {sum(bool(outcome.problems) for outcome in mine)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()

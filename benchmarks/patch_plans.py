"""Patch lengths of a million entropy maps on one core, beside the rule walked in plain Python.

    python benchmarks/patch_plans.py [--maps 1000000] [--tokens 256]

Entropies are random float32 nats, the threshold is cut so that the mean length is 1.81 under a maximum of 4 and row ends.
Timed is the way from entropies to lengths as they are stored (flat uint16); in every repeat some maps are walked, and the
lengths compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import numpy as np
import torch

from dpar_core.patches.rule import PatchRule, flat_lengths, patch_starts_numpy, threshold_for_mean_length

MEAN, MAX = 1.81, 4
SLICE, WALKED = 50_000, 2_000  # maps in memory at once, as many as some shards hold; maps walked in plain Python a repeat


def walk(entropies: np.ndarray, rule: PatchRule) -> list[int]:
    """Return the patch lengths of one map (T,), token by token."""
    lengths, current, since = [], 0, 0
    for place, entropy in enumerate(entropies.tolist()):
        new_row = place % rule.row_width == 0
        gate = place <= 1 or new_row or entropy > rule.threshold  # nothing predicts the first token, so two begin alone
        since = 0 if gate else since + 1
        if gate or since % rule.max_patch_length == 0:
            if current:
                lengths.append(current)
            current = 0
        current += 1
    return [*lengths, current]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--maps", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    row_width = math.isqrt(options.tokens)
    rng = np.random.default_rng(0)
    maps = rng.gamma(20.0, 0.35, (min(options.maps, SLICE), options.tokens)).astype(np.float32)
    rule = PatchRule("entropy_rows", row_width, 0.0, MAX)
    threshold = threshold_for_mean_length(maps[:20_000], rule, MEAN)
    rule = PatchRule("entropy_rows", row_width, float(np.float32(threshold)), MAX)
    vectorised, walked, patches = [], [], 0
    for _ in range(options.repeats):
        some = maps[rng.choice(len(maps), min(WALKED, len(maps)), replace=False)]
        started = time.perf_counter()
        expected = [walk(one, rule) for one in some]
        walked.append((time.perf_counter() - started) * 1e6 / len(some))
        found = flat_lengths(patch_starts_numpy(some, rule))
        same = found.lengths.tolist() == [length for one in expected for length in one]
        if not same or found.counts.tolist() != [len(one) for one in expected]:
            raise SystemExit("the vectorised rule and the walk disagree: tests/dpar_core/test_patching.py says where")
        patches, started = 0, time.perf_counter()
        for first in range(0, options.maps, len(maps)):
            lengths, _ = flat_lengths(patch_starts_numpy(maps[: options.maps - first], rule))
            patches += len(lengths)
        vectorised.append((time.perf_counter() - started) * 1e6 / options.maps)
    seconds, plain = statistics.median(vectorised), statistics.median(walked)
    mean = options.maps * options.tokens / patches
    print(f"{options.maps:,} maps of {options.tokens} tokens, mean length {mean:.2f}, one core, {options.repeats} repeats")
    print(f"  vectorised   {seconds:8.2f} s a million")
    print(f"  plain Python {plain:8.2f} s a million ({WALKED:,} maps walked), {plain / seconds:.1f} times as long")
    print(
        "RESULT "
        + json.dumps(
            {
                "seconds_per_million": seconds,
                "plain_seconds_per_million": plain,
                "ratio": plain / seconds,
                "mean_length": mean,
            }
        )
    )


if __name__ == "__main__":
    main()

"""Time and memory of all metrics on 50,000 x 2,048 features against another 50,000, beside straightforward code.

    python benchmarks/score.py [--images 50000] [--dimensions 2048] [--baseline-images 10000]

Features are random with a decaying spectrum, as a network's are. The baseline is what one writes first: scipy.linalg.sqrtm
for the trace, whole distance matrices with torch.cdist for precision and recall. Its distance matrices do not fit in memory
at full size (three of 10 GB), so both sides are also timed at a smaller size, where ratios are taken.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from dpar_core.evaluation.metrics import FeatureMoments, frechet_distance, inception_score, kernel_distance, precision_recall
from dpar_core.system import cpus

CLASSES = 1008


def features(count: int, dimensions: int, seed: int, shift: float) -> np.ndarray:
    """Return correlated features (count, dimensions) float32, made in pieces."""
    rng = np.random.default_rng(seed)
    scale = (1 / np.sqrt(1 + np.arange(dimensions) / 20)).astype(np.float32)
    mixing = np.random.default_rng(7).normal(size=(dimensions, 64)).astype(np.float32) / 8
    out = np.empty((count, dimensions), np.float32)
    for first in range(0, count, 5000):
        rows = out[first : first + 5000]
        rows[:] = rng.standard_normal(rows.shape, dtype=np.float32) * scale
        rows += rng.standard_normal((len(rows), 64), dtype=np.float32) @ mixing.T + shift
    return out


def probabilities(count: int, seed: int) -> np.ndarray:
    """Return class probabilities (count, CLASSES) float32."""
    logits = np.random.default_rng(seed).standard_normal((count, CLASSES), dtype=np.float32) * 3
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def ours(a: np.ndarray, b: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return the metrics as the project computes them."""

    def distance() -> float:
        one, other = FeatureMoments.of(a), FeatureMoments.of(b)
        return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)

    return {
        "Frechet distance": distance,
        "precision and recall": lambda: precision_recall(a, b),
        "KID": lambda: kernel_distance(a, b),
        "IS": lambda: inception_score(probabilities(len(a), 3)),
    }


def plain(a: np.ndarray, b: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return the two dear ones as one writes them first."""

    def distance() -> float:
        sigma_a, sigma_b = np.cov(a.astype(np.float64), rowvar=False), np.cov(b.astype(np.float64), rowvar=False)
        root = np.real(scipy.linalg.sqrtm(sigma_a @ sigma_b))
        difference = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
        return float(difference @ difference + np.trace(sigma_a + sigma_b - 2 * root))

    def both() -> tuple[float, float]:
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        radius_x = torch.cdist(x, x).kthvalue(4, dim=1).values
        radius_y = torch.cdist(y, y).kthvalue(4, dim=1).values
        across = torch.cdist(y, x)
        precision = (across <= radius_x).any(dim=1).float().mean()
        return float(precision), float((radius_y >= across.T).any(dim=1).float().mean())

    return {"Frechet distance": distance, "precision and recall": both}


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Return (seconds, result)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--baseline-images", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(cpus())
    a, b = (features(options.images, options.dimensions, seed, seed * 0.02) for seed in (0, 1))
    seconds = {name: timed(work)[0] for name, work in ours(a, b).items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.images:,} x {options.dimensions:,} against as many, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"  {name:22} {value:8.1f} s")
    print(f"  {'all':22} {sum(seconds.values()):8.1f} s, largest memory {peak:.2f} GiB")
    small_a, small_b = a[: options.baseline_images], b[: options.baseline_images]
    ratios = {}
    print(f"{options.baseline_images:,} against as many, beside plain code")
    mine, theirs = ours(small_a, small_b), plain(small_a, small_b)
    for name in theirs:
        ours_s, ours_value = timed(mine[name])
        plain_s, plain_value = timed(theirs[name])
        ratios[name] = plain_s / ours_s
        print(f"  {name:22} {ours_s:8.1f} s, plain {plain_s:8.1f} s, {ratios[name]:.2f} times as fast")
        print(f"  {'':22} {ours_value} and {plain_value}")
    print(
        "RESULT "
        + json.dumps(
            {
                "images": options.images,
                "dimensions": options.dimensions,
                "seconds": sum(seconds.values()),
                "by_metric": seconds,
                "peak_gib": peak,
                "ratio_frechet": ratios["Frechet distance"],
                "ratio_precision_recall": ratios["precision and recall"],
            }
        )
    )


if __name__ == "__main__":
    main()

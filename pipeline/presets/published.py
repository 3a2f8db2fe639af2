"""Published figures that the report shows beside our own: quoted, not measured.

ImageNet, 50,000 samples, ADM evaluator. DPAR: arXiv 2512.21867; LlamaGen: arXiv 2406.06525.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One row. size: pixels of a side; steps: of the large transformer, an image."""

    model: str
    size: int
    parameters: str
    fid: float
    inception_score: float
    precision: float
    recall: float
    steps: int


PUBLISHED = (
    Published("LlamaGen-B", 256, "111M", 5.46, 193.61, 0.84, 0.46, 256),
    Published("DPAR-B (cfg 2.1)", 256, "120M", 3.98, 250.62, 0.83, 0.49, 142),
    Published("LlamaGen-L", 256, "343M", 3.80, 248.30, 0.83, 0.52, 256),
    Published("DPAR-L (cfg 1.9)", 256, "352M", 2.93, 269.34, 0.81, 0.56, 142),
    Published("LlamaGen-XL", 256, "775M", 3.39, 227.10, 0.81, 0.54, 256),
    Published("DPAR-XL (cfg 2.0)", 256, "789M", 2.67, 281.65, 0.82, 0.56, 142),
    Published("LlamaGen-B", 384, "111M", 6.09, 182.53, 0.84, 0.42, 576),
    Published("DPAR-B (cfg 2.1)", 384, "120M", 4.29, 254.54, 0.83, 0.47, 280),
    Published("LlamaGen-L", 384, "343M", 3.07, 256.06, 0.83, 0.52, 576),
    Published("DPAR-L (cfg 1.9)", 384, "352M", 2.79, 283.84, 0.81, 0.55, 280),
    Published("LlamaGen-XL", 384, "775M", 2.62, 244.08, 0.80, 0.57, 576),
    Published("DPAR-XL (cfg 1.9)", 384, "789M", 2.60, 285.43, 0.81, 0.57, 280),
    Published("LlamaGen-XXL", 384, "1.4B", 2.34, 253.91, 0.81, 0.60, 576),
    Published("DPAR-XXL (cfg 1.75)", 384, "1.4B", 2.30, 287.37, 0.82, 0.59, 280),
)

"""Published figures that the report shows beside our own: quoted, not measured.

ImageNet, 50,000 samples, ADM evaluator. DPAR: arXiv 2512.21867; LlamaGen: arXiv 2406.06525.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Published(NamedTuple):
    """One row.

    name: B to XXL.
    size: pixels of a side.
    steps: of the large transformer per image.
    cfg: guidance scale.
    """

    family: Literal["LlamaGen", "DPAR"]
    name: str
    size: int
    parameters: str
    fid: float
    inception_score: float
    precision: float
    recall: float
    steps: int
    cfg: float | None = None

    @property
    def model(self) -> str:
        """What the row is called."""
        return f"{self.family}-{self.name}" + ("" if self.cfg is None else f" (cfg {self.cfg})")


PUBLISHED = (
    Published("LlamaGen", "B", 256, "111M", 5.46, 193.61, 0.84, 0.46, 256),
    Published("DPAR", "B", 256, "120M", 3.98, 250.62, 0.83, 0.49, 142, 2.1),
    Published("LlamaGen", "L", 256, "343M", 3.80, 248.30, 0.83, 0.52, 256),
    Published("DPAR", "L", 256, "352M", 2.93, 269.34, 0.81, 0.56, 142, 1.9),
    Published("LlamaGen", "XL", 256, "775M", 3.39, 227.10, 0.81, 0.54, 256),
    Published("DPAR", "XL", 256, "789M", 2.67, 281.65, 0.82, 0.56, 142, 2.0),
    Published("LlamaGen", "B", 384, "111M", 6.09, 182.53, 0.84, 0.42, 576),
    Published("DPAR", "B", 384, "120M", 4.29, 254.54, 0.83, 0.47, 280, 2.1),
    Published("LlamaGen", "L", 384, "343M", 3.07, 256.06, 0.83, 0.52, 576),
    Published("DPAR", "L", 384, "352M", 2.79, 283.84, 0.81, 0.55, 280, 1.9),
    Published("LlamaGen", "XL", 384, "775M", 2.62, 244.08, 0.80, 0.57, 576),
    Published("DPAR", "XL", 384, "789M", 2.60, 285.43, 0.81, 0.57, 280, 1.9),
    Published("LlamaGen", "XXL", 384, "1.4B", 2.34, 253.91, 0.81, 0.60, 576),
    Published("DPAR", "XXL", 384, "1.4B", 2.30, 287.37, 0.82, 0.59, 280, 1.75),
)
# Patches per image on ImageNet by (tokens per image, threshold), with rows and at most 4 tokens.
PATCHES = {(256, 7.8): 142, (576, 7.9): 280}


def published(family: str, name: str, size: int) -> Published | None:
    """Return the row of a model at a size in pixels, None when there is none."""
    return next((row for row in PUBLISHED if (row.family, row.name, row.size) == (family, name, size)), None)

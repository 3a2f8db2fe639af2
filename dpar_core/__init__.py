"""The numerics and file formats of DPAR, and the names that a notebook needs (docs/library.md).

    import dpar_core

    run = dpar_core.load_run("artifacts")
    sampled = run.generate(labels=[0, 1], seeds=[7, 8], cfg_scale=2.0)
    images = run.decode(sampled.tokens)

Nothing is loaded before it is used: `import dpar_core` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpar_core.evaluation.features import feature_network as feature_network
    from dpar_core.evaluation.image_sets import read_image_set as read_image_set
    from dpar_core.generation.generate import Generated as Generated
    from dpar_core.library import ImageScores as ImageScores
    from dpar_core.library import Patches as Patches
    from dpar_core.library import Run as Run
    from dpar_core.library import load_run as load_run
    from dpar_core.library import open_image as open_image
    from dpar_core.library import patch_lengths as patch_lengths
    from dpar_core.library import score_images as score_images
    from dpar_core.patches.rule import PatchRule as PatchRule
    from dpar_core.pictures import labelled_grid as labelled_grid
    from dpar_core.pictures import save_png as save_png

_HOMES = {
    "Generated": "dpar_core.generation.generate",
    "ImageScores": "dpar_core.library",
    "PatchRule": "dpar_core.patches.rule",
    "Patches": "dpar_core.library",
    "Run": "dpar_core.library",
    "feature_network": "dpar_core.evaluation.features",
    "labelled_grid": "dpar_core.pictures",
    "load_run": "dpar_core.library",
    "open_image": "dpar_core.library",
    "patch_lengths": "dpar_core.library",
    "read_image_set": "dpar_core.evaluation.image_sets",
    "save_png": "dpar_core.pictures",
    "score_images": "dpar_core.library",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpar_core' has no attribute {name!r}: expected one of {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

"""`dpar-cli init`: from a folder of one's own images to a params.yaml that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.project import project_folder

# More passes over a few dozen images only memorise them, but a verdict needs steps (pipeline/report/verdicts.py).
_MOST_EPOCHS, _FEWEST_STEPS = 50, 100
_FEATURES = 64  # of the demo's classifier: a distance of fewer images than that is a rough one


def init(
    images: Annotated[Path, typer.Option(help="Folder with a folder of image files for each class.")],
    into: Annotated[Path, typer.Option(help="Folder for the links to training and validation images.")] = Path("own-images"),
    share: Annotated[float, typer.Option(min=0.01, max=0.5, help="Share of each class for validation.")] = 0.1,
    preset: Annotated[str, typer.Option(help="Sizes and steps to begin with: demo, or smoke for a quick trial.")] = "demo",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml that differs from every preset.")] = False,
) -> None:
    """Look at your own images, split them, and write a params.yaml for them.

    Reads every image below --images and changes none; writes links to them below --into, and params.yaml. A params.yaml that
    you have changed is kept as params.yaml.bak with --force. Next: `dpar-cli run`. docs/own-images.md is the recipe.

        dpar-cli init --images pictures    # pictures/cat/001.jpg, pictures/dog/...
    """
    from dpar_core.files import atomic_write
    from pipeline.presets.use import preset_file, with_values
    from stages.params import load_params
    from stages.terminal import print_fitted, wrapped
    from stages.tools.own_images import describe, split_images
    from stages.tracker import PrintTracker

    root = project_folder()
    if not images.is_dir():
        raise FileNotFoundError(f"no folder at {images}: expected a folder with a folder of images for each class")
    text, kept = _checked(root, preset, force)
    print_fitted(f"looking at what is in {images}")
    found = split_images(images, into, share=share, tracker=PrintTracker())
    for line in describe(found, images):
        print(wrapped(line.strip(), first="  " if line.startswith(" ") else "", rest="  "))
    values = suggested(text, train=found.training, validation=found.validation, classes=len(found.counts), into=into)
    body = with_values(text, values).split("\n", 1)[1]
    text = f"# Own images from {str(images)!a}. Made by dpar-cli init.\n{body}"
    if kept:
        (root / "params.yaml").replace(root / "params.yaml.bak")
        print("the old params.yaml is params.yaml.bak")
    atomic_write(root / "params.yaml", text)
    steps = load_params(root / "params.yaml").train.steps
    if values.get("score.allow_singular"):
        few = f"{found.training} training images are few: distances will be rough, and a verdict on them needs more than"
        print(wrapped(f"{few} {_FEATURES}", rest="  "))
    if steps < (usual := load_params(preset_file(root, preset)).train.steps):
        print_fitted(f"train.steps is {steps}, not {usual}: in more steps so few images would be memorised")
    duration = {"demo": "a quarter of an hour", "smoke": "two minutes, for pictures of noise"}.get(
        preset, "as its preset says"
    )
    done = f"params.yaml is preset {preset} with your images, on two cores about {duration}: continue with `dpar-cli run`"
    print(wrapped(done, rest="  "))


def _checked(root: Path, preset: str, force: bool) -> tuple[str, bool]:
    """Return a preset's text, and whether params.yaml has changes that are to be kept. Raises ValueError."""
    from pipeline.presets.use import preset_file, preset_names

    text, target = preset_file(root, preset).read_text("utf-8"), root / "params.yaml"
    if not target.exists():
        return text, False
    now = target.read_text("utf-8")
    changed = not any(now == (root / "params" / f"{name}.yaml").read_text("utf-8") for name in preset_names(root))
    if changed and not force:
        raise ValueError(f"{target.name} has changes of yours: --force replaces it and keeps it as {target.name}.bak")
    return text, changed


def suggested(text: str, *, train: int, validation: int, classes: int, into: Path) -> dict[str, Any]:
    """Return the params to set in a preset's text for so many images and classes, by dotted name."""
    from ruamel.yaml import YAML

    preset = YAML(typ="safe").load(text)
    samples = max(preset["sample"]["images"] // classes, 1) * classes
    values: dict[str, Any] = {
        "data.source": "imagefolder",
        "data.train": str(into / "train"),
        "data.validation": str(into / "validation"),
        "sample.images": samples,
        "score.images": min(samples, train),
        "report.examples": min(preset["report"]["examples"], validation),
        "tokenizer.batch_size": min(preset["tokenizer"]["batch_size"], train),
    }
    for section, part in (("train", preset["train"]), ("entropy_model.train", preset["entropy_model"]["train"])):
        values[f"{section}.validation_images"] = 0 if validation <= part["validation_images"] else part["validation_images"]
        values[f"{section}.batch_size"] = batch = min(part["batch_size"], train)
        values[f"{section}.steps"] = min(part["steps"], max(_FEWEST_STEPS, _MOST_EPOCHS * train // batch))
    if train <= _FEATURES or values["score.images"] <= _FEATURES:
        values["score.allow_singular"] = True
    return values

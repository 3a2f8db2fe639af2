"""Where the command `dpar-cli` begins: our packages are those beside this file, whatever PYTHONPATH has of their names."""

from __future__ import annotations

from importlib import util
from pathlib import Path


def main() -> None:
    """Run dpar-cli with the code of this folder."""
    folder = Path(__file__).resolve().parent
    spec = util.spec_from_file_location("dpar_pin", folder / "stages" / "workers" / "child.py")
    assert spec is not None and spec.loader is not None
    child = util.module_from_spec(spec)
    spec.loader.exec_module(child)
    child.pin(folder)
    from pipeline.main import main as start

    start()

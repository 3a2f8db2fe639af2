"""The top floor. A user's own `stages.py` in the current folder or on PYTHONPATH must not take the place of ours."""

import runpy
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1]
runpy.run_path(str(_FOLDER / "stages" / "workers" / "child.py"))["pin"](_FOLDER)

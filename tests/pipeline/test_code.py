"""The code that made an artifact has a name, the same in every process and wherever it lies."""

import shutil
import subprocess
import sys

from pipeline.code import code_identity
from tests.helpers.paths import ROOT


def test_code_is_named_by_its_sources_wherever_they_lie(tmp_path):
    for name in ("dpar_core", "stages", "pipeline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def named() -> str:
        code = "import pipeline.code as c; print(c.code_identity()['source'])"
        words, path = [sys.executable, "-P", "-c", code], {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(words, capture_output=True, text=True, check=True, env=path).stdout.strip()

    assert named() == code_identity()["source"]
    with open(tmp_path / "stages" / "data.py", "a") as stream:
        stream.write("# another line\n")
    assert named() != code_identity()["source"]

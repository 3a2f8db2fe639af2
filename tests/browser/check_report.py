"""The report in a real browser (`make browser`, needs Chromium): the slider cuts patches as the rule does, and nothing
is loaded or reported as an error. Not part of `make test`, which needs no browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpar_core.patches.maps import read_rule
from dpar_core.patches.rule import patch_starts
from pipeline.report import page as report
from stages.params import select
from stages.tracker import NullTracker
from tests.helpers.report_artifacts import tiny_params, write_artifacts

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
# Moves the slider as a person would, and leaves what the page shows in its title.
DRIVER = """
<script>
{
const shown = () => ({
  value: document.querySelector("#slider").value,
  lengths: document.querySelector("#hero").dataset.lengths,
  count: document.querySelector("#count").textContent.replace(/\\s+/g, " ").trim(),
  borders: document.querySelector("#hero .borders").getAttribute("d").length,
});
const one = document.querySelector("#slider"), found = [shown()];
for (const share of [0, 0.25, 0.5, 0.75, 1]) {
  one.value = Number(one.min) + share * (Number(one.max) - Number(one.min));
  one.dispatchEvent(new Event("input"));
  found.push(shown());
}
one.stepUp(-3);
one.dispatchEvent(new Event("input"));
found.push(shown());
document.querySelector("#reset").click();
found.push(shown());
document.querySelector("#theme").click();
document.querySelector("#borders").click();
const wide = document.documentElement.scrollWidth > innerWidth;
const loaded = performance.getEntriesByType("resource").map((one) => one.name).filter((name) => !name.startsWith("data:"));
const bordered = document.querySelector("#compared").classList.contains("bordered");
document.title = JSON.stringify({ found, theme: document.documentElement.dataset.theme, wide, bordered, loaded });
}
</script>
"""


def browse(page, folder, *, width: int) -> tuple[dict, str]:
    """Open a page in Chromium; return what its driver found and what the browser logged."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-sync",
        "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},1200",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=4000",
        "--dump-dom",
        page.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", result.stdout, re.S).group(1)
    for code, character in (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        title = title.replace(code, character)
    return json.loads(title), result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    params = tiny_params()
    inputs = write_artifacts(root, params)
    outputs = report.Outputs(root / "report", root / "metrics.json")
    report.run(select(params, report.Params), inputs, outputs, NullTracker(), device="cpu", work=root)
    text = (root / "report/index.html").read_text()
    (root / "driven.html").write_text(text.replace("</body>", f"{DRIVER}</body>"))
    return root, inputs, text


@pytest.mark.parametrize("width", [1440, 500])
def check_report(made, tmp_path, width):
    assert BROWSER, "no Chromium on this machine: install it, or leave `make browser` out"
    root, inputs, text = made
    seen, log = browse(root / "driven.html", tmp_path, width=width)
    assert "CONSOLE" not in log and seen["loaded"] == [] and not seen["wide"]
    assert seen["theme"] in ("light", "dark") and seen["bordered"]
    exact = re.search(r'data-exact="([^"]*)"', text).group(1)
    entropies = np.array([np.nan if nats == "" else float(nats) for nats in exact.split(",")], np.float32)
    rule = read_rule(inputs.patch_maps / "rule.json")

    def lengths(threshold: float) -> list[int]:
        used = replace(rule, threshold=threshold)
        starts = patch_starts(torch.from_numpy(np.nan_to_num(entropies))[None], used)[0].numpy()
        return np.diff([*np.flatnonzero(starts), len(entropies)]).tolist()

    first, *moved, stepped, reset = seen["found"]
    assert first["lengths"] == reset["lengths"] == ",".join(map(str, lengths(rule.threshold)))
    assert len({one["count"] for one in moved}) > 1
    for one in (*moved, stepped):
        expected = lengths(float(one["value"]))
        assert one["lengths"] == ",".join(map(str, expected))
        assert one["count"].startswith(f"{len(expected)} patches instead of {len(entropies)} tokens")

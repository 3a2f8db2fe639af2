"""The report in a real browser (`make browser`, needs Chromium): the slider cuts patches as the rule does, by keyboard too,
and nothing is loaded or reported as an error. Not part of `make test`, which needs no browser."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpar_core.patches.maps import read_rule
from dpar_core.patches.rule import patch_starts
from pipeline.report import page as report
from stages.params import select
from stages.tracker import NullTracker
from tests.browser.chromium import Browser
from tests.helpers.report_artifacts import tiny_params, write_artifacts

SHOWN = """({
  value: document.querySelector("#slider").value,
  lengths: document.querySelector("#hero").dataset.lengths,
  count: document.querySelector("#count").textContent.replace(/\\s+/g, " ").trim(),
  borders: document.querySelector("#hero .borders").getAttribute("d").length,
})"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    params = tiny_params()
    inputs = write_artifacts(root, params)
    outputs = report.Outputs(root / "report", root / "metrics.json")
    report.run(select(params, report.Params), inputs, outputs, NullTracker(), device="cpu", work=root)
    return root / "report/index.html", inputs


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("width", [390, 768, 1440])
@pytest.mark.parametrize("dark", [False, True])
def check_the_page_fits_and_asks_for_nothing(made, browser, width, dark):
    browser.loaded.clear()
    browser.show(made[0], width=width, dark=dark)
    assert browser.logged == [] and [one for one in browser.loaded if not one.startswith(("file:", "data:"))] == []
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    ink, paper = browser.ask("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    bright = [np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == dark
    assert browser.ask('document.querySelectorAll("#compared figure.dpar .tile").length') > 0


def check_the_slider_moves_by_keyboard_and_cuts_patches_as_the_rule_does(made, browser):
    page, inputs = made
    browser.show(page, width=1024)
    exact = browser.ask('document.querySelector("#hero").dataset.exact')
    entropies = np.array([np.nan if nats == "" else float(nats) for nats in exact.split(",")], np.float32)
    rule = read_rule(inputs.patch_maps / "rule.json")

    def lengths(threshold: float) -> list[int]:
        used = replace(rule, threshold=threshold)
        starts = patch_starts(torch.from_numpy(np.nan_to_num(entropies))[None], used)[0].numpy()
        return np.diff([*np.flatnonzero(starts), len(entropies)]).tolist()

    first = browser.ask(SHOWN)
    browser.ask('document.querySelector("#slider").focus()')
    moved = []
    for key, times in (("Home", 1), ("ArrowRight", 9), ("End", 1), ("ArrowLeft", 30)):
        browser.press(key, times)
        moved.append(browser.ask(SHOWN))
    assert len({one["value"] for one in moved}) == 4 and len({one["count"] for one in moved}) > 1
    for one in moved:
        expected = lengths(float(one["value"]))
        assert one["lengths"] == ",".join(map(str, expected))
        assert one["count"].startswith(f"{len(expected)} patches instead of {len(entropies)} tokens")
    browser.press("Tab")  # on to the button that resets
    browser.press(" ")
    assert browser.ask(SHOWN)["lengths"] == first["lengths"] == ",".join(map(str, lengths(rule.threshold)))


def check_theme_and_patch_borders_are_switched_by_keyboard(made, browser):
    browser.show(made[0], width=1024)
    for selector, then in (
        ("#theme", "document.documentElement.dataset.theme"),
        ("#borders", 'document.querySelector("#compared").classList.contains("bordered")'),
    ):
        before = browser.ask(then)
        browser.ask(f'document.querySelector("{selector}").focus()')
        browser.press(" ")
        assert browser.ask(then) != before, selector


def check_the_page_prints_light_and_without_controls(made, browser, tmp_path):
    browser.show(made[0], width=1024, dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.ask('getComputedStyle(document.querySelector("header")).display') == "none"
    assert browser.ask("getComputedStyle(document.documentElement).colorScheme") == "light"
    browser.printed(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")

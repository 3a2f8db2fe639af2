"""The report: one offline page, the same for the same artifacts, that says who wins and by what."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dpar_core.data.shards import TokenShards
from dpar_core.evaluation.sample_files import read_samples
from dpar_core.files import load_weights
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.maps import PatchMaps, write_summary
from pipeline.presets.published import PUBLISHED
from pipeline.report import page as report
from pipeline.report.facts import (
    count_costs,
    count_patches,
    equal_time,
    held_out_losses,
    read_training,
)
from pipeline.report.pictures import border_path, leading_samples, sample_grid
from pipeline.report.verdicts import Estimate
from pipeline.runner import STAGES
from stages.params import select
from stages.tracker import NullTracker
from tests.helpers.report_artifacts import edit_json, tiny_params, write_artifacts, write_curves, write_scores


@pytest.fixture(scope="module")
def params():
    return tiny_params()


@pytest.fixture(scope="module")
def made(tmp_path_factory, params):
    root = tmp_path_factory.mktemp("project")
    write_artifacts(root, params)
    return root


@pytest.fixture
def inputs(made, tmp_path):
    shutil.copytree(made / "artifacts", tmp_path / "artifacts")
    return report.Inputs(**{n: tmp_path / p for n, p in report_inputs().items()})


def report_inputs():
    return STAGES["report"].inputs


def render(inputs, folder, params, tracker=None):
    outputs = report.Outputs(folder)
    report.run(select(params, report.Params), inputs, outputs, tracker or NullTracker(), device="cpu", work=folder)
    return (folder / "index.html").read_text()


@pytest.fixture(scope="module")
def page(made, params, tmp_path_factory):
    inputs = report.Inputs(**{n: made / p for n, p in report_inputs().items()})
    return render(inputs, tmp_path_factory.mktemp("page") / "report", params)


class Page(HTMLParser):
    VOID = frozenset(("meta", "img", "input", "br"))

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.words, self.tables = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href"):
                self.links.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "circle", "rect"), f"<{tag}/> is no element that closes itself"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_needs_nothing_from_outside(page):
    parsed = Page(page)
    assert parsed.links and all(link.startswith(("data:image/", "#")) for link in parsed.links)
    assert not re.search(r"https?://|@import|url\(", page)
    anchors = {link[1:] for link in parsed.links if link.startswith("#")}
    assert all(f'id="{name}"' in page for name in anchors)


def test_the_same_artifacts_give_the_same_bytes(inputs, params, tmp_path):
    files = []
    for name in ("one", "two"):
        render(inputs, tmp_path / name, params)
        files.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"index.html", "headline.json", *(f"patches-{n:02d}.png" for n in range(4))}


def test_the_page_holds_no_path_and_no_place_left_empty(page, made):
    text = Page(page).text
    assert str(made) not in page and "/tmp" not in page
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b|Undefined|{{|}}", text)


def test_who_wins_is_said_at_the_top(inputs, params, tmp_path):
    write_scores(inputs.scores / "dpar.json", fd_demo=10.0)
    page = render(inputs, tmp_path / "r", params)
    told = json.loads((tmp_path / "r" / "headline.json").read_text())["verdicts"]
    headline = re.search(r"<h1>(.*?)</h1>", page).group(1)
    steps, time = told
    assert headline.startswith(steps["title"]) and headline.endswith(f"{time['when']}.")
    won = {row["words"]: row["winner"] for row in steps["rows"]}
    assert won["fd_demo"] == "dpar" and won["is_demo"] is None and won["precision"] is None
    loss = next(row for row in steps["rows"] if row["words"] == "validation loss")
    expected = "dpar" if loss["winner"] in (None, "dpar") else "split"
    assert steps["winner"] == expected


def test_a_lead_by_more_training_time_wins_nothing(inputs, params, tmp_path):
    write_scores(inputs.scores / "llamagen_equal_time.json", fd_demo=10.0)

    def verdict(name):
        text = Page(render(inputs, tmp_path / name, params)).text
        rows = json.loads((tmp_path / name / "headline.json").read_text())["verdicts"][1]["rows"]
        return text, next(row for row in rows if row["words"] == "fd_demo")

    text, row = verdict("equal")
    assert row["winner"] == "twin" and "That is not equal" not in text
    # At 400 of 500 steps the twin has trained 16 of 20 s, DPAR 10: 60 % more; step 250 would be equal.
    write_curves(inputs.models / "llamagen", [(100, 2.65), (300, 2.5), (500, 2.42)], seconds=20.0)
    text, row = verdict("unequal")
    assert row["winner"] is None and row["discounted"] == "twin"
    assert "60 % more than DPAR had" in text and "Step 250 would have been" in text
    assert "does not count, as it had 60 % more training time" in text


def test_published_and_own_numbers_never_share_a_column(page):
    table = page[page.index('<table class="published">') :]
    table = table[: table.index("</table>")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", table, re.S)]
    rows = [row for row in rows if row]
    assert len(rows) == 3 + len(PUBLISHED) and len({len(row) for row in rows}) == 1
    for column in range(3, len(rows[0])):
        ours, theirs = ({bool(row[column]) for row in part} for part in (rows[:3], rows[3:]))
        assert True not in ours or True not in theirs
    assert "fd_demo" in table and ">FID<" in table


def test_a_static_rule_and_a_decoder_gate_are_told_as_what_they_are(inputs, params, tmp_path):
    rule = {"mode": "static", "row_width": 4, "threshold": None, "max_patch_length": None, "static_length": 2}
    edit_json(inputs.patch_maps / "rule.json", rule=rule)
    summary = json.loads((inputs.patch_maps / "summary.json").read_text())
    write_summary(inputs.patch_maps, summary["files"], made_by=summary["made_by"], facts=summary.get("facts"))
    edit_json(inputs.samples / "dpar" / "samples.json", gate="decoder", cfg_scale=1.0)
    text = Page(render(inputs, tmp_path / "r", params)).text
    assert "patches are cut by rule (static)" in text and "threshold" not in text.split("What it costs")[0]
    assert "gate: the decoder itself" in text


def test_scores_of_two_protocols_are_refused(inputs, params, tmp_path):
    write_scores(inputs.scores / "llamagen.json", protocol_id="ffff0000")
    with pytest.raises(ValueError, match="abcd1234 and ffff0000 are not compared"):
        render(inputs, tmp_path / "r", params)
    assert not (tmp_path / "r").exists()


def test_a_model_of_other_tokens_is_refused(inputs, params, tmp_path):
    edit_json(inputs.tokens / "summary.json", digest="0123456789abcdef")
    with pytest.raises(ValueError, match="run `dvc repro"):
        render(inputs, tmp_path / "r", params)


def test_a_missing_score_says_what_to_run(inputs, params, tmp_path):
    (inputs.scores / "llamagen_equal_time.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"llamagen_equal_time\.json is missing: run `dvc repro report`"):
        render(inputs, tmp_path / "r", params)


def test_pictures_and_figures_go_to_the_tracker(inputs, params, tmp_path):
    tracker = NullTracker()
    render(inputs, tmp_path / "r", params, tracker)
    assert [path.name for path in tracker.pictures] == ["patches-00.png", "patches-01.png", "patches-02.png"]
    assert 0 < tracker.metrics["patch/share_of_tokens"] <= 1
    assert Image.open(tracker.pictures[0]).mode == "RGB"


def test_losses_are_those_of_each_image_alone(made):
    tokens, maps_folder = made / "artifacts/tokens", made / "artifacts/patch_maps"
    shards = TokenShards(tokens, "validation")
    maps = PatchMaps(maps_folder, shards)
    file = made / "artifacts/models/dpar/model.safetensors"
    found = held_out_losses(file, shards, maps, device="cpu")
    assert found.shape == (len(shards),)
    weights = load_weights(file, kind="dpar")
    model = DPAR(DPARConfig(**weights.config)).eval()
    model.load_state_dict(weights.state)
    at = (np.array([7]), np.array([0]))
    one = torch.from_numpy(shards.tokens(*at).astype(np.int64))
    layout = PatchLayout.from_lengths(maps.lengths(*at), row_width=4)
    with torch.inference_mode():
        logits = model(one, torch.tensor([int(shards.labels[7])]), layout)
    assert found[7] == pytest.approx(float(F.cross_entropy(logits[0], one[0])), rel=1e-5)


def test_patches_are_counted_over_all_views_and_by_class(made):
    shards = TokenShards(made / "artifacts/tokens", "train")
    found = count_patches(made / "artifacts/patch_maps", made / "artifacts/patch_lengths.csv", shards)
    maps = PatchMaps(made / "artifacts/patch_maps", shards)
    every = np.arange(len(shards))
    counts = np.array([[len(x) for x in maps.lengths(every, np.full(len(every), v))] for v in (0, 1)])
    assert found.mean == pytest.approx(counts.mean())
    assert found.by_class["coffee"] == pytest.approx(counts[:, shards.labels == shards.meta.classes.index("coffee")].mean())
    assert sum(share for _, share in found.shares) == pytest.approx(1)


def test_flops_are_those_of_the_method(made):
    trainings = {name: read_training(made / "artifacts/models" / name) for name in ("dpar", "llamagen")}
    gate = read_training(made / "artifacts/entropy_model").config
    shards = TokenShards(made / "artifacts/tokens", "train")
    patches = count_patches(made / "artifacts/patch_maps", made / "artifacts/patch_lengths.csv", shards)
    costs = count_costs(trainings, gate, patches, made / "artifacts/samples")
    n, d, v, layers = 16, 32, 16, 3
    k = 2 * (4 * d * d + 3 * d * 96)
    assert costs.forward["llamagen"] == n * layers * k + 4 * n * n * d * layers + 2 * n * v * d
    assert costs.drawing["llamagen"] == 2 * costs.forward["llamagen"]
    assert costs.training_speed == {"dpar": 32 * 500 / 10, "llamagen": 32 * 500 / 12.5}
    assert costs.clocked("training_speed") == pytest.approx(1.25)


def test_curves_are_read_between_their_points(made):
    twin = read_training(made / "artifacts/models/llamagen")
    assert twin.seconds_at(400) == pytest.approx(10.0)
    assert twin.loss_at(10.0) == pytest.approx(2.46)
    assert twin.step_at(5.0) == pytest.approx(200)
    assert twin.step_at(25.0) == pytest.approx(1000)


def test_equal_time_takes_the_model_of_the_twin_that_trained_about_as_long(made, inputs):
    def found():
        trainings = {name: read_training(inputs.models / name) for name in ("dpar", "llamagen")}
        return equal_time(trainings, inputs.models)

    even = found()
    assert (even.twin, even.step, even.seconds, even.shared) == ("llamagen_equal_time", 400, 10.0, 10.0)
    assert (even.twin_seconds, even.needed) == (pytest.approx(10.0), pytest.approx(400))
    assert even.losses == {"dpar": 2.4, "llamagen": pytest.approx(2.46)}
    assert even.is_equal and even.advantaged is None
    # A twin that was faster in all: its last model is nearer, and still had less time.
    write_curves(inputs.models / "llamagen", [(100, 2.65), (300, 2.5), (500, 2.42)], seconds=8.0)
    late = found()
    assert (late.twin, late.step, late.twin_seconds) == ("llamagen", 500, pytest.approx(8.0))
    assert (late.advantaged, late.handicap, late.shared) == ("dpar", "25 % more training time", 8.0)


def test_a_curve_of_another_run_is_refused(inputs):
    edit_json(inputs.models / "dpar/timings.json", curve=[])
    with pytest.raises(ValueError, match=r"of different runs: run `dvc repro -f train_dpar`"):
        read_training(inputs.models / "dpar")


def test_the_grid_shows_the_samples_and_the_patches_they_were_drawn_in(made):
    folder = made / "artifacts/samples/dpar"
    names = [f"class {n}" for n in range(9)]
    grid = sample_grid(folder, names, row_width=4, borders=True)
    assert [words for words, _ in grid.rows] == names and all(len(cells) == 2 for _, cells in grid.rows)
    assert all("borders" in cell for _, cells in grid.rows for cell in cells)
    images, labels = leading_samples(folder / "samples.npz", 5)
    whole = read_samples(folder / "samples.npz")
    assert (images == whole.images[:5]).all() and (labels == whole.labels[:5]).all()
    many = sample_grid(folder, [f"class {n}" for n in range(30)], row_width=4, borders=False)
    assert [len(cells) for _, cells in many.rows] == [8, 8, 2]


def test_border_paths_are_in_token_units():
    assert border_path(np.array([2, 2]), 2) == "M0 1H2"
    assert border_path(np.array([1, 1, 2]), 2) == "M1 0V1M0 1H2"


def test_numbers_are_written_for_people():
    written = [report.number(v) for v in (0.01234, 4.567, 123.4, 12345.6)]
    assert written == ["0.012", "4.57", "123", "12,346"]
    assert [report.flop(v) for v in (8.1e6, 2.34e9, 1.2e13)] == ["8.1 MFLOP", "2.34 GFLOP", "12 TFLOP"]


def test_intervals_are_written_so_that_their_ends_differ():
    one, other = Estimate(34.8127, (34.7945, 34.8307)), Estimate(120.0, (100.0, 140.0))
    assert report.written(one) == [("34.813", "34.794 – 34.831")]
    assert report.written(other) == [("120", "100 – 140")]
    assert report.written(one, other)[1] == ("120.000", "100.000 – 140.000")
    assert report.written(Estimate(0.5), Estimate(1.5)) == [("0.500", ""), ("1.50", "")]

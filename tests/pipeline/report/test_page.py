"""The report: one offline page, the same for the same artifacts, whose verdicts and speeds its numbers carry."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dpar_core.data.manifest import Row
from dpar_core.data.shards import TokenShards
from dpar_core.data.sources import ImageOpener
from dpar_core.evaluation.sample_files import read_samples
from dpar_core.files import load_weights
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.maps import MadeBy, PatchMaps, write_summary
from dpar_core.patches.rule import PatchRule, starts_by_entropy
from dpar_core.turns import Turns
from pipeline.presets.published import PUBLISHED
from pipeline.report import page as report
from pipeline.report.facts import (
    PatchFacts,
    count_costs,
    count_patches,
    equal_time,
    held_out_losses,
    read_training,
)
from pipeline.report.pictures import _opened, border_path, leading_samples, sample_cells
from pipeline.report.speeds import Speed, Speeds
from pipeline.report.verdicts import Estimate
from pipeline.runner import STAGES
from stages.params import select
from stages.shared.pace import Pace
from stages.tracker import NullTracker
from tests.helpers.report_artifacts import edit_json, tiny_params, write_artifacts, write_curves, write_scores, write_speed


@pytest.fixture(scope="module")
def params():
    return tiny_params(train={"storage": "s3://KEY:hunter2@bucket/runs"})


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
    outputs = report.Outputs(folder, folder.parent / f"{folder.name}.json")
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
        assert tag in ("path", "circle", "rect"), f"<{tag}/> does not close itself"

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


def test_the_page_shows_no_password(page):
    assert "hunter2" not in page and "s3://***@bucket/runs" in page


def test_the_same_artifacts_give_the_same_bytes(inputs, params, tmp_path):
    files = []
    for name in ("one", "two"):
        render(inputs, tmp_path / name, params)
        files.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    pictures = {"losses.svg", "patch_lengths.svg", *(f"patches-{n:02d}.png" for n in range(4))}
    assert set(files[0]) == {"index.html", "headline.json"} | pictures
    losses = files[0]["losses.svg"].decode()
    ElementTree.fromstring(losses)
    assert 'class="dpar"' in losses and 'class="llamagen"' in losses and "LlamaGen baseline" in losses


def test_the_footer_says_when_and_by_which_code_the_stages_last_ran_here(inputs, params, tmp_path):
    assert "is not recorded on this machine" in Page(render(inputs, tmp_path / "none", params)).text
    for stage, finished in (("data", 1_700_000_000.0), ("train_dpar", 1_700_000_900.0)):
        folder = tmp_path / "work" / stage
        folder.mkdir(parents=True)
        code = {"version": "1.0", "source": "abcdef0123456789"}
        last = {"finished": finished, "seconds": 90.0, "code": code, "commit": "0123456789ab", "machine": "a machine"}
        (folder / "last.json").write_text(json.dumps(last | {"packages": {"Python": "3.11.9", "torch": "2.11.0"}}))
    text = Page(render(inputs, tmp_path / "some", params)).text
    assert "Made by dpar 1.0 (sources abcdef012345), commit 0123456789ab, between 2023-11-14 22:13 and 2023-11-14" in text
    assert "2 stages, 3 min 00 s in all, by the last run of each on this machine: a machine (Python 3.11.9, torch" in text
    assert re.search(r"DPAR [0-9a-f]{16} dvc repro -sf train_dpar 2023-11-14 22:28 1 min 30 s", text)
    assert "not recorded" in text  # of the stages that did not run here


def test_the_time_of_an_image_is_shown_by_part_where_it_was_measured(inputs, params, tmp_path):
    assert "Not measured in this run" in Page(render(inputs, tmp_path / "none", params)).text
    parts = {"dpar": [["patch transformer", 0.0101], ["decoding to pixels", 0.0021]], "llamagen": [["transformer", 0.0201]]}
    edit_json(inputs.speed / "sampling.json", parts=parts)
    text = Page(render(inputs, tmp_path / "some", params)).text
    assert "DPAR: 12.2 ms patch transformer 10.1 decoding to pixels 2.10 baseline: 20.1 ms transformer 20.1" in text


def test_the_page_holds_no_path_and_no_place_left_empty(page, made):
    text = Page(page).text
    assert str(made) not in page and "/tmp" not in page
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b|Undefined|{{|}}", text)


def judged(inputs, folder, params):
    """Render the page as if its random weights knew something; return its text, its headline and headline.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.report.facts.nothing_learned", lambda *_: ())
        page = render(inputs, folder, params)
    return Page(page).text, re.search(r"<h1>(.*?)</h1>", page).group(1), json.loads((folder / "headline.json").read_text())


def test_random_weights_are_worse_than_a_guess_and_get_no_verdict(page):
    text = Page(page).text
    assert "<h1>No verdict at equal steps and at equal training time.</h1>" in page
    assert "The validation losses of both models (" in text and "are above the 2.77 of a uniform guess" in text


def test_the_verdict_is_the_headline(inputs, params, tmp_path):
    write_scores(inputs.scores / "dpar.json", fd_demo=10.0)
    _, headline, found = judged(inputs, tmp_path / "r", params)
    steps, time = found["verdicts"]
    assert headline == found["headline"] and headline.startswith(steps["title"]) and time["when"] in headline
    won = {row["words"]: row["winner"] for row in steps["rows"]}
    assert won["fd_demo"] == "dpar" and won["is_demo"] is None and won["precision"] is None
    loss = next(row for row in steps["rows"] if row["words"] == "validation loss")
    expected = "dpar" if loss["winner"] in (None, "dpar") else "mixed"
    assert steps["winner"] == expected and steps["judged"]


def test_the_badge_tells_what_the_run_can_show(page, made):
    assert "Demo: nine photographs, one seed. It shows the workflow and is not a research result." in Page(page).text
    manifest = report.read_manifest(made / "artifacts/data/manifest.parquet")
    own = {"source": "imagefolder", "train": "photos/train", "validation": "photos/val"}
    assert report.badge(tiny_params(data=own), manifest, 500)["words"] == (
        "18 training images of 9 classes, 500 steps, one seed."
    )
    short = report.badge(tiny_params(data=own), manifest, 12)
    assert short["name"] == "Trial:" and short["words"].startswith("12 steps, one seed. It shows the workflow")


def test_a_baseline_slowed_by_another_program_gives_no_speed_and_no_verdict_at_equal_time(inputs, params, tmp_path):
    write_scores(inputs.scores / "llamagen_equal_time.json", fd_demo=10.0)
    write_speed(inputs.speed / "training.json", [0.02] * 8, [0.0456] * 8)
    text, headline, found = judged(inputs, tmp_path / "r", params)
    assert found["training_speed"]["ratio"] is None and "2.28×" not in text
    assert "the machine was busy: DPAR measured 2.28 times (2.28 to 2.28) as fast as the baseline in training" in text
    assert headline.endswith("no verdict at equal training time.") or headline.startswith("No verdict")
    assert not found["verdicts"][1]["judged"] and "Not shown: the machine was busy" in text
    assert found["verdicts"][0]["judged"] and "0.95× the baseline's speed in sampling" in text


def test_a_pace_that_drifts_gives_no_speed(inputs, params, tmp_path):
    write_speed(inputs.speed / "training.json", [0.02] * 9, [0.02] * 6 + [0.03] * 3)
    write_speed(inputs.speed / "sampling.json", [0.1] * 6 + [0.14] * 3, [0.1] * 9)
    text, _, found = judged(inputs, tmp_path / "r", params)
    assert found["training_speed"]["ratio"] is found["sampling_speed"]["ratio"] is None
    assert "the pace of the baseline in training moved by 50 % between turns" in text
    assert "the pace of DPAR in sampling moved by 40 % between turns" in text


def test_a_training_run_on_a_busy_machine_is_named_and_its_seconds_are_not_used(inputs, params, tmp_path):
    timings = json.loads((inputs.models / "llamagen/timings.json").read_text())
    timings["curve"][2]["images_per_s"] *= 0.5
    edit_json(inputs.models / "llamagen/timings.json", curve=timings["curve"], seconds=99.0)
    text, _, found = judged(inputs, tmp_path / "r", params)
    assert "While the baseline trained, the machine was busy: its pace moved by 33 %." in text
    assert found["training_speed"]["ratio"] == pytest.approx(1.04)


def test_twelve_steps_give_no_verdict(inputs, params, tmp_path):
    write_scores(inputs.scores / "dpar.json", fd_demo=10.0)
    for name in ("dpar", "llamagen"):
        write_curves(inputs.models / name, [(6, 2.72), (12, 2.7)], seconds=0.3)
    text, headline, found = judged(inputs, tmp_path / "r", params)
    assert headline == "No verdict at equal steps and at equal training time."
    assert "12 optimizer steps are too few to compare trained models (at least 100)." in text
    assert [one["judged"] for one in found["verdicts"]] == [False, False]


def test_a_singular_covariance_judges_no_score(inputs, params, tmp_path):
    for name in ("dpar", "llamagen", "llamagen_equal_time"):
        write_scores(inputs.scores / f"{name}.json", fd_demo=10.0 if name == "dpar" else 20.0, features=64)
    text, _, found = judged(inputs, tmp_path / "r", params)
    assert "not judged: 18 images are too few for 64 features (singular covariance)" in text
    assert {row["words"]: row["winner"] for row in found["verdicts"][0]["rows"]}["fd_demo"] is None


def test_overlapping_intervals_show_no_clear_difference(inputs, params, tmp_path):
    wide = {"eval/fd_demo": [5.0, 30.0], "eval/is_demo": [2.0, 4.0]}
    write_scores(inputs.scores / "dpar.json", fd_demo=10.0, intervals=wide)
    text, _, found = judged(inputs, tmp_path / "r", params)
    assert "fd_demo and is_demo show no clear difference" in text
    rows = {row["words"]: row for row in found["verdicts"][0]["rows"]}
    assert rows["fd_demo"]["why"] == "intervals overlap" and rows["fd_demo"]["judged"]


def test_unequal_times_give_no_verdict_at_equal_time(inputs, params, tmp_path):
    write_scores(inputs.scores / "llamagen_equal_time.json", fd_demo=10.0)
    text, _, found = judged(inputs, tmp_path / "equal", params)
    assert found["verdicts"][1]["judged"] and "had trained" not in found["verdicts"][1]["sentence"]
    write_speed(inputs.speed / "training.json", [0.03] * 8, [0.02] * 8)
    text, _, found = judged(inputs, tmp_path / "unequal", params)
    assert found["verdicts"][1]["title"] == "No verdict at equal training time"
    assert "at step 500 the baseline had trained 33 % less than DPAR at step 500, more than the 10 % that count as" in (
        text[0].lower() + text
    ).replace("At step 500", "at step 500")
    assert "it would have needed 750 steps, more than it was given" in text


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


def test_a_static_rule_and_a_decoder_gate_are_shown_as_what_they_are(inputs, params, tmp_path):
    rule = {"mode": "static", "row_width": 4, "threshold": None, "max_patch_length": None, "static_length": 2}
    edit_json(inputs.patch_maps / "rule.json", rule=rule)
    summary = json.loads((inputs.patch_maps / "summary.json").read_text())
    made_by = MadeBy.read(summary["made_by"])
    write_summary(inputs.patch_maps, summary["files"], made_by=made_by, facts=summary.get("facts"))
    edit_json(inputs.samples / "dpar" / "samples.json", gate="decoder", cfg_scale=1.0)
    params = params.model_copy(update={"train": params.train.model_copy(update={"validation_images": 5})})
    text = Page(render(inputs, tmp_path / "r", params)).text
    assert "the same 18 validation images" in text and "on 5 images, while the verdicts take 18" in text
    assert "patches are cut by rule (static)" in text and "threshold" not in text.split("What it costs")[0]
    assert (
        "no gate, cached" in text
        and "no gate, decoding to pixels not" in text
        and "DPAR also needs its entropy model" not in text
    )


def test_scores_of_two_protocols_are_refused(inputs, params, tmp_path):
    write_scores(inputs.scores / "llamagen.json", splits=5)
    with pytest.raises(ValueError, match=r"scores of protocols \w{8} and \w{8} are not compared"):
        render(inputs, tmp_path / "r", params)
    assert not (tmp_path / "r").exists()


def test_a_model_of_other_tokens_is_refused(inputs, params, tmp_path):
    edit_json(inputs.tokens / "summary.json", digest="0123456789abcdef")
    with pytest.raises(ValueError, match="run `dvc repro -sf"):
        render(inputs, tmp_path / "r", params)


def test_a_missing_score_says_what_to_run(inputs, params, tmp_path):
    (inputs.scores / "llamagen_equal_time.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"llamagen_equal_time\.json is missing: run `dvc repro -sf score_llamagen`"):
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
    assert costs.sampling["llamagen"] == 2 * costs.forward["llamagen"]
    m = json.loads((made / "artifacts/samples/dpar/metrics.json").read_text())["patch/patches_per_image"]
    encoder = (n - 1) * k + 4 * (n - 1) ** 2 * d + 4 * d * d * (m + n - 1) + 4 * m * (n - 1) * d
    assert costs.parts["patch encoder"] == pytest.approx(encoder)  # guidance does not double it: it sees no class
    assert costs.parts["patch transformer"] == pytest.approx(2 * ((m + 1) * k + 4 * (m + 1) ** 2 * d))
    assert sum(costs.parts.values()) == pytest.approx(costs.sampling["dpar"])
    assert costs.parts["output layer"] == pytest.approx(2 * 2 * n * v * d) and costs.parts["entropy model"] == costs.gate


def test_a_decoder_that_is_its_own_gate_is_counted_again_where_its_entropy_began_a_patch(made, inputs):
    trainings = {name: read_training(made / "artifacts/models" / name) for name in ("dpar", "llamagen")}
    gate = read_training(made / "artifacts/entropy_model").config
    patches = count_patches(inputs.patch_maps, inputs.histogram, TokenShards(inputs.tokens, "train"))
    before = count_costs(trainings, gate, patches, inputs.samples)
    edit_json(inputs.samples / "dpar" / "samples.json", gate="decoder")
    costs = count_costs(trainings, gate, patches, inputs.samples)
    with np.load(inputs.samples / "dpar" / "tokens.npz") as archive:
        starts = np.unpackbits(archive["starts"], axis=1, count=16).astype(bool)
    rule = PatchRule(**json.loads((inputs.samples / "dpar" / "samples.json").read_text())["rule"])
    again, d = starts_by_entropy(starts, rule).sum() / len(starts), 32
    one = 2 * (4 * d * d + 3 * d * 96) + 4 * 16 * d + 2 * 16 * d  # the decoder's only layer and the output layer
    assert again > 0 and costs.parts["decoder as the gate"] == pytest.approx(again * one)
    assert costs.sampling["dpar"] == pytest.approx(before.sampling["dpar"] - before.gate + again * one)


def test_curves_are_read_between_their_points(made):
    baseline = read_training(made / "artifacts/models/llamagen")
    assert baseline.loss_at(400) == pytest.approx(2.46) and baseline.loss_at(500) == pytest.approx(2.42)
    assert baseline.drift == pytest.approx(0)


def test_equal_time_takes_the_model_of_the_baseline_that_trained_about_as_long(made):
    trainings = {name: read_training(made / "artifacts/models" / name) for name in ("dpar", "llamagen")}

    def found(ratio):
        pace = Pace("step", 32, Turns((1.0,) * 6, (ratio,) * 6))
        return equal_time(trainings, made / "artifacts/models", Speed("training", pace, 2.0))

    even = found(1.04)
    assert (even.model, even.step, even.needed) == ("llamagen_equal_time", 480, pytest.approx(500 / 1.04))
    assert even.is_equal and even.difference == pytest.approx(480 * 1.04 / 500 - 1) and not even.obstacle
    assert even.at == {"dpar": pytest.approx(500), "llamagen": pytest.approx(500 / 1.04)}
    assert even.losses["dpar"] == pytest.approx(2.4)
    longer = found(1.5)
    assert longer.difference == pytest.approx(0.44)
    assert "44 % longer than DPAR at step 500" in longer.obstacle and "step 333 would have been equal" in longer.obstacle
    # A baseline whose steps are shorter: its last model is nearest, and still had less time.
    slow = found(0.8)
    assert (slow.model, slow.step, slow.needed) == ("llamagen", 500, pytest.approx(625))
    assert slow.at == {"dpar": pytest.approx(400), "llamagen": pytest.approx(500)}
    unsure = Pace("step", 32, Turns((1.0,) * 6, (0.9, 1.04, 1.04, 1.04, 1.04, 1.3)))
    vague = equal_time(trainings, made / "artifacts/models", Speed("training", unsure, 2.0))
    assert vague.is_equal and "known only to within 25 %" in vague.obstacle
    assert "20 % less than DPAR" in slow.obstacle and "would have needed 625 steps" in slow.obstacle


def test_losses_at_equal_time_lie_on_the_lines_over_time(made):
    """Where the median of the ratios (1.1) is not the quotient of the medians (1.2)."""
    trainings = {name: read_training(made / "artifacts/models" / name) for name in ("dpar", "llamagen")}
    turns = Turns((1.0, 1.0, 1.5) * 3, (1.1, 1.2, 1.65) * 3)
    speed = Speed("training", Pace("step", 32, turns), 2.0)
    times = equal_time(trainings, made / "artifacts/models", speed)
    patches = PatchFacts(16, 8.0, (4.0, 12.0), {"a": 8.0}, ((1, 0.5), (2, 0.5)))
    charts = report.draw_charts(trainings, patches, times, Speeds(speed, speed), {"dpar": "DPAR", "llamagen": "B"})
    points = re.findall(r"B: ([\d.]+) at ([\d.]+) seconds of training", charts["by_time"])
    assert speed.ratio == pytest.approx(1.1) and charts["shared"] == pytest.approx(500)
    on_the_line = np.interp(charts["shared"], [float(x) for _, x in points], [float(y) for y, _ in points])
    assert on_the_line == pytest.approx(times.losses["llamagen"], abs=1e-3)


def test_a_curve_of_another_run_is_refused(inputs):
    edit_json(inputs.models / "dpar/timings.json", curve=[])
    with pytest.raises(ValueError, match=r"of different runs: run `dvc repro -sf train_dpar`"):
        read_training(inputs.models / "dpar")


def test_samples_of_all_models_stand_beside_real_crops_of_the_same_class(made, page):
    folder = made / "artifacts/samples/dpar"
    names = [f"class {n}" for n in range(9)]
    cells = sample_cells(folder, names, row_width=4, borders=True)
    assert sorted(cells) == list(range(9)) and all(len(of) == 2 for of in cells.values())
    assert all("borders" in cell and cell["name"] == names[label] for label, of in cells.items() for cell in of)
    images, labels = leading_samples(folder / "samples.npz", 5)
    whole = read_samples(folder / "samples.npz")
    assert (images == whole.images[:5]).all() and (labels == whole.labels[:5]).all()
    rows = re.findall(r'<div class="row" style="--groups: 4">(.*?)</div></figure>\n</div>', page, re.S)
    assert len(rows) == 9
    for row in rows:
        assert re.findall(r'<figure class="(\w+)">', row) == ["real", "dpar", "llamagen", "llamagen_equal_time"]
        assert row.count("<img") == 2 + 3 * 2


def test_a_baseline_that_is_taken_at_its_last_step_is_shown_once(inputs, params, tmp_path):
    shutil.copy(inputs.models / "llamagen/model.safetensors", inputs.models / "llamagen/equal_time.safetensors")
    page = render(inputs, tmp_path / "r", params)
    assert "baseline at step" not in page and 'class="llamagen_equal_time"' not in page
    assert page.count('style="--groups: 3"') == 9 and "at equal training time" in page


def test_an_image_of_the_page_that_is_gone_is_named_with_the_way_out():
    row = Row("validation-1", "validation", "validation:a/1.png", None, 0, "a")
    with pytest.raises(ValueError, match=r"image validation:a/1\.png, which the report shows, cannot be read: No such file"):
        _opened(ImageOpener({"validation": "/nowhere"}, {}), row)


def test_border_paths_are_in_token_units():
    assert border_path(np.array([2, 2]), 2) == "M0 1H2"
    assert border_path(np.array([1, 1, 2]), 2) == "M1 0V1M0 1H2"


def test_numbers_are_written_for_people():
    written = [report.number(v) for v in (0.01234, 0.0004, -0.00321, 4.567, 123.4, 12345.6)]
    assert written == ["0.012", "0.00040", "-0.0032", "4.57", "123", "12,346"]
    assert [report.flop(v) for v in (8.1e6, 2.34e9, 1.2e13)] == ["8.1 MFLOP", "2.34 GFLOP", "12 TFLOP"]
    assert [report.flop(v) for v in (999.6e6, 999.4e6, 0.0)] == ["1 GFLOP", "999 MFLOP", "0 FLOP"]


def test_intervals_are_written_so_that_their_ends_differ():
    one, other = Estimate(34.8127, (34.7945, 34.8307)), Estimate(120.0, (100.0, 140.0))
    assert report.written(one) == [("34.813", "34.794 – 34.831")]
    assert report.written(other) == [("120", "100 – 140")]
    assert report.written(one, other)[1] == ("120.000", "100.000 – 140.000")
    assert report.written(Estimate(0.5), Estimate(1.5)) == [("0.500", ""), ("1.50", "")]


def test_a_dozen_numbers_go_to_dvc_and_a_speed_in_doubt_is_none_of_them(inputs, params, tmp_path, monkeypatch):
    write_speed(inputs.speed / "sampling.json", [0.1] * 6 + [0.14] * 3, [0.1] * 9)
    summarised = report.summary_metrics

    def of_a_long_run(rounds, patches, costs, times, *others):
        long = summarised(rounds, patches, costs, replace(times, step=1_187_654), *others)
        assert long["equal_time_step"] == 1_187_654  # the name of a snapshot, not a quantity to round
        return summarised(rounds, patches, costs, times, *others)

    monkeypatch.setattr(report, "summary_metrics", of_a_long_run)
    render(inputs, tmp_path / "r", params)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["training_speed"] == 1.04 and "sampling_speed" not in found and len(found) <= 12
    assert found["dpar_distance"] == 20.0 and found["equal_time_step"] == 480

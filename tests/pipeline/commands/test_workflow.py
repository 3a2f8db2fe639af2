"""`dpar-cli run`, `status` and `doctor`: what a person reads, and that a fault stops a run before any stage."""

import io
import json
import re
import sys

import pytest
from typer.testing import CliRunner

from pipeline import doctor as health
from pipeline.cli import app
from pipeline.commands import workflow
from pipeline.commands.workflow import Narrator, RunPlan, Screen, graph_lines, status_lines
from pipeline.presets.use import preset_lines
from pipeline.results import result_line
from pipeline.runner import STAGES
from pipeline.state import StageState
from stages.artifacts import HEADLINE, TOKENIZER_METRICS, TRAINING_SPEED
from stages.params import load_params
from stages.terminal import about, colour, duration, shortened, size, wrapped
from stages.tracker import rate_words
from tests.helpers.paths import ROOT

HERE = {"version": "1.0", "source": "abcdef0123456789"}


def state(name, kind="never run", seconds=None, needs=(), why="", **more):
    return StageState(name, tuple(needs), kind, why, None if seconds is None else 1000.0, seconds, 2_000_000, **more)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project with the params and the workflow of this one."""
    for name in ("dvc.yaml", "params.yaml", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name in (".dvc", "params"):
        (tmp_path / name).mkdir()
    (tmp_path / "params/demo.yaml").write_text((ROOT / "params/demo.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(workflow, "STARTING", 0.0)
    return tmp_path


def set_param(project, old, new):
    text = (project / "params.yaml").read_text()
    assert old in text
    (project / "params.yaml").write_text(text.replace(old, new))


def own_images(project):
    set_param(project, "source: builtin ", "source: imagefolder ")
    for name in ("train", "validation"):
        set_param(project, f"  {name}: null  ", f"  {name}: photos/{name} ")


@pytest.mark.parametrize("name", ["reference", "weights", "data"])
def test_a_missing_path_stops_a_run_before_any_stage(project, monkeypatch, capsys, name):
    if name == "data":
        own_images(project)
        missing = "data.train"
    elif name == "weights":
        set_param(project, "weights: null ", "weights: weights/vq.pt ")
        missing = "tokenizer.weights"
    else:
        set_param(project, "reference: train ", "reference: references/imagenet.npz ")
        missing = "score.reference"
    monkeypatch.setattr(workflow, "_follow", lambda *_, **__: pytest.fail("a stage was started"))
    with pytest.raises(ValueError, match="nothing was started"):
        workflow.run()
    printed = capsys.readouterr().out
    assert re.search(rf"FAIL  {re.escape(missing)} .*does not\s+exist", printed)
    assert max(map(len, printed.splitlines())) <= 80


def test_doctor_looks_into_what_is_there(project):
    (project / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (project / "empty.pt").write_text("")
    (project / "nothing").mkdir()
    (project / "inception-2015-12-05.pt").write_text("not it")
    (project / "good.npz").write_bytes(b"x" * 2000)
    found = {name: health.check_path("p", name) for name in ("lfs.pt", "empty.pt", "nothing", "gone/x.pt", "good.npz")}
    assert {name: check.verdict for name, check in found.items()} == {
        "lfs.pt": "fail",
        "empty.pt": "fail",
        "nothing": "fail",
        "gone/x.pt": "fail",
        "good.npz": "ok",
    }
    assert "Git LFS pointer" in found["lfs.pt"].found and found["good.npz"].found == "good.npz, 2.0 kB"
    other = health.check_path("score.features_file", "inception-2015-12-05.pt")
    assert other.verdict == "warn" and "as published" in other.found
    assert health.check_path("data.train", "s3://KEY:SECRET@bucket/train").verdict == "fail"
    assert health.check_path("train.storage", "s3://KEY:SECRET@bucket/train").verdict == "ok"
    assert "is a folder" in health.check_path("tokenizer.weights", "params").found
    (project / "page.npz").write_text("<!doctype html>")
    assert "is an HTML page" in health.check_path("score.reference", "page.npz").found
    assert "SECRET" not in health.check_path("data.train", "s3://KEY:SECRET@bucket/train").found
    assert all(check.fix for check in found.values() if check.verdict != "ok")


def test_every_path_of_the_params_is_looked_at(project):
    own_images(project)
    set_param(project, "storage: null ", "storage: /proc/none ")
    named = {check.name: check.verdict for check in health.paths(load_params(project / "params.yaml"))}
    assert named["data.train"] == named["data.validation"] == "fail"
    assert {"train.storage", "entropy_model.train.storage"} < set(named)
    lacking = health.check_path("score.features_file", "weights/inception-2015-12-05.pt")
    assert lacking.fix.startswith("dpar-cli fetch inception --to weights/inception-2015-12-05.pt, or change")


def test_more_workers_than_this_machine_holds_are_named_before_anything_runs(project):
    assert "workers" not in [check.name for check in health.examine(project)]
    set_param(project, "  gpus_per_worker: 0 ", "  gpus_per_worker: 1000 ")
    found = [check for check in health.examine(project) if check.name == "workers"]
    assert [(check.verdict, check.found.partition(" asks")[0]) for check in found] == [
        ("warn", f"`{section}.workers`") for section in ("entropy_model.train", "train")
    ]
    assert all("RAY_ADDRESS" in check.fix for check in found)


def test_doctor_tells_what_is_wrong_with_the_surroundings(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(sys, "version_info", (3, 9, 0, "final", 0))
    set_param(project, "seed: 0 ", "seed: -1 ")
    (project / "dvc.yaml").write_text("stages:\n")
    (project / "dvc.lock").write_text("<<<<<<< HEAD\n")
    broken = [(check.verdict, check.found, check.fix) for check in health.examine(project) if check.name == "dvc"]
    assert [verdict for verdict, *_ in broken] == ["fail", "fail"] and broken[0][
        1
    ] == f"{project / 'dvc.yaml'} has no stages"
    assert [fix[:41] for *_, fix in broken] == [f"take it from git (`git restore dvc.{end}`)" for end in ("yaml", "lock")]
    (project / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (project / "dvc.lock").unlink()
    (project / ".dvc").rmdir()
    found = {check.name: check for check in health.examine(project)}
    assert found["dvc"].verdict == "fail" and "dvc init" in found["dvc"].fix
    assert found["mlflow"].verdict == "warn" and found["ray"].verdict == "fail" and found["python"].verdict == "fail"
    assert found["params.yaml"].verdict == "fail" and "`seed` is -1" in found["params.yaml"].found
    assert all(check.fix for check in found.values() if check.verdict != "ok")
    assert max(map(len, "\n".join(health.lines(list(found.values()))).splitlines())) <= 80


@pytest.mark.parametrize(
    ("address", "verdict"),
    [("", "ok"), ("local", "ok"), ("auto", "ok"), ("host:abc", "fail"), ("ray://[::1", "fail"), (":9", "fail")],
)
def test_doctor_takes_addresses_as_ray_does_and_refuses_what_is_none(monkeypatch, address, verdict):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert health._ray().verdict == verdict
    assert not health._answers(f"http://{address}", 9)


def test_the_plan_says_how_long_by_runs_on_this_machine_or_by_what_the_preset_takes(project, monkeypatch):
    monkeypatch.setattr(workflow, "EXPECTED", {"demo": {"data": 20.0, "train": 880.0}})
    first = RunPlan(project, [state("data"), state("train")])
    assert first.words() == "2 stages, about 15 min on two cores, 4.0 MB of artifacts"
    again = RunPlan(project, [state("data", "fresh", 5.0), state("train", "stale", 100.0), state("score", "stale", 20.0)])
    assert "about 2 min on this machine" in again.words() and again.words().endswith("1 is up to date")
    other = RunPlan(project, [state("data", "stale", 5.0), state("train", "stale", 2.0, changes=True)])
    assert "about 15 min on two cores" in other.words()  # with other params its last run here says little
    mixed = RunPlan(project, [state("train", "stale", 100.0), state("score")])
    assert "2 min and the time of 1 stage that has not run here yet" in mixed.words()
    assert "of unknown duration at first" in RunPlan(project, [state("score")]).words()
    assert RunPlan(project, [state("data", "fresh")]).words() == "1 stage, all up to date"
    own_images(project)  # of the demo's sizes
    assert "about 15 min on two cores" in RunPlan(project, [state("data"), state("train")]).words()
    monkeypatch.setitem(workflow.EXPECTED["demo"], "train_dpar", 2200.0)
    set_param(project, "steps: 220 ", "steps: 110 ")  # half as long
    assert "about 18 min on two cores" in RunPlan(project, [state("train_dpar")]).words()
    set_param(project, "image_size: 32 ", "image_size: 64 ")
    assert "of unknown duration at first" in RunPlan(project, [state("data"), state("train")]).words()


def test_where_files_outside_may_have_changed_that_is_said(project):
    own_images(project)
    said = "all up to date, unless files changed that data.train, data.validation"
    assert said in RunPlan(project, [state("data", "fresh")]).words().replace("\n", " ")
    lines = status_lines([state("data", "fresh", 5.0)], project, now=1300.0, code=HERE)
    assert said in lines[-1].replace("\n", " ") and max(map(len, "\n".join(lines).splitlines())) <= 80


def test_every_stage_of_the_demo_has_an_expected_duration():
    stages = set(STAGES) - {workflow.LOOK}
    for preset in workflow.EXPECTED:
        assert set(workflow.EXPECTED[preset]) == stages, f"preset {preset}: EXPECTED of pipeline/commands/workflow.py"
        assert all(seconds > 0 for seconds in workflow.EXPECTED[preset].values())


def test_a_run_shows_a_line_when_a_stage_begins_its_progress_and_one_when_it_ends(project):
    now, stream = [0.0], io.StringIO()
    states = [state("tokenizer", "stale", 60.0), state("entropies", "stale", 30.0), state("report", "stale", 9.0)]
    narrator = Narrator(RunPlan(project, states), Screen(stream), clock=lambda: now[0])
    metrics = {"tokenizer/psnr_db": 25.11, "tokenizer/codes_used": 419, "tokenizer/codebook_use": 419 / 512}
    (project / TOKENIZER_METRICS.path).parent.mkdir(parents=True)
    (project / TOKENIZER_METRICS.path).write_text(json.dumps(metrics))
    lines = [
        "Running stage 'sources':",
        "> dpar-cli stage sources",  # looks on every run: not announced
        "'data/x.dvc' didn't change, skipping",
        "Running stage 'tokenizer':",
        "> dpar-cli stage tokenizer",
        "tokenizer.precision: auto is fp32 here, which is explained in a sentence of more than eighty columns",
        "Updating lock file 'dvc.lock'",
        "",
        "Stage 'entropies' is cached - skipping run, checking out outputs",
        "Running stage 'report':",
    ]
    for number, line in enumerate(lines):
        now[0] = 24.0 * number
        narrator.line(line)
        if number == 5:
            assert narrator.progress("tokenizer 19/280 steps 7 % 1.8 steps/s ETA 0:02:21 loss=0.3078")
            assert not narrator.progress("a warning of a library")
    assert stream.getvalue().splitlines() == [
        "[1/3] tokenizer  (about 2 min left in all)",
        "tokenizer.precision: auto is fp32 here, which is explained in a sentence of more",
        "    than eighty columns",
        "    tokenizer 19/280 steps 7 % 1.8 steps/s, 02:21 left, 3 min in all",
        "    25.1 dB, 419 of 512 codes (2 min 00 s)",
        "[2/3] entropies  (about 78 s left in all)",  # stages take twice what they took before
        "    done (from the cache)",
        "[3/3] report  (about 18 s left in all)",
    ]
    assert narrator.stopped("stopped") == (
        "stopped in stage report: 2 of 3 stages are done, and nothing of them is lost.\n`dpar-cli run` continues from here."
    )


def test_on_a_terminal_a_line_of_progress_gives_way_to_the_next(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True
    screen = Screen(stream)
    screen.progress("1 of 2")
    screen.progress("2 of 2")
    screen.line("done")
    assert stream.getvalue() == "1 of 2\r\033[K2 of 2\r\033[Kdone\n"


def test_dvc_is_followed_to_its_end_and_its_failure_is_reported(project, capsys):
    script = "import sys; print(\"Running stage 'data':\"); print('3 images'); "
    lock = "WARNING: Process 'dvc repro' with (Pid 7), in RWLock-file 'a/b' had been killed. Auto removed it from it."
    script += f'print("{lock}", file=sys.stderr); '
    script += "print('no such file' + ' or folder' * 9, file=sys.stderr); sys.exit(int(sys.argv[1]))"
    for code, expected in ((0, 0), (255, 1)):
        narrator = Narrator(RunPlan(project, [state("data", "stale", 1.0)]), Screen(sys.stdout))
        assert workflow._follow([sys.executable, "-c", script, str(code)], narrator, verbose=False) == expected
    printed = capsys.readouterr()
    assert "[1/1] data  (about 1 s left in all)\n3 images\n    done (0 s)" in printed.out
    assert max(map(len, printed.err.splitlines())) <= 80, "what a stage says on standard error is wrapped"
    assert (
        "RWLock" not in printed.err
        and printed.err.count("no such file") == 2
        and "failed in stage data: 0 of 1 stages are done" in printed.err
    )


def test_a_speed_is_a_result_only_where_the_report_would_show_it(project):
    def line(**values) -> str:
        file = project / TRAINING_SPEED.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"drift": [0.1, 0.1], "ratio": 1.5, "interval": [1.45, 1.6]} | values))
        return result_line("time_training", project)

    assert line() == "DPAR 1.50 times the baseline (1.45 to 1.60)"
    assert line(drift=[0.1, 0.3]) == "the machine was busy (pace moved by 30 %): no speed"
    (project / HEADLINE.path).parent.mkdir(parents=True)
    speeds = {name: {"flops_allow": 1.4} for name in ("training_speed", "sampling_speed")}
    (project / HEADLINE.path).write_text(json.dumps(speeds))
    assert line() == "the machine was busy (ratio 1.50, where FLOPs allow 1.40): no speed"
    assert line(interval=[1.3, 1.6]) == "DPAR 1.50 times the baseline (1.30 to 1.60)"


def test_the_verdict_ends_a_run_within_80_columns(project):
    assert "dpar-cli status" in workflow._verdict(project, [])
    speed = {"ratio": 1.07, "doubt": "", "interval": [1.0, 1.1]}
    found = {
        "badge": "Demo: nine photographs, one seed. It shows the workflow and is not a research result.",
        "headline": "No clear difference at equal steps; no verdict at equal training time.",
        "verdicts": [{"title": "No verdict at equal training time", "sentence": "The machine was busy, " * 9}],
        "patches_per_image": 35.4,
        "tokens": 64,
        "flops_saved": 0.29,
        "training_speed": speed,
        "sampling_speed": speed | {"doubt": "the machine was busy"},
    }
    (project / HEADLINE.path).parent.mkdir(parents=True)
    (project / HEADLINE.path).write_text(json.dumps(found))
    assert "1.07" not in workflow._verdict(project, ["report"]), "the verdict of an earlier run was shown as this one's"
    card = workflow._verdict(project, [])
    assert "1.07 times the baseline's" in card and "speed of sampling: the machine was busy" in card
    assert "35.4 patches per 64 tokens, 29 % of the FLOPs saved" in card
    assert max(len(line) for line in card.splitlines() if "file://" not in line) <= 80


def test_status_fits_80_columns_and_names_what_is_to_run(project):
    states = [
        state("tokenizer", "fresh", 151.0),
        state("train_dpar", "stale", 4000.0, ["tokenizer"], "train.lr_schedule cosine -> constant, 7 more differ"),
        state("report", needs=["train_dpar", "tokenizer"]),
    ]
    lines = "\n".join(status_lines(states, project, now=1300.0, code=HERE)).splitlines()
    assert max(map(len, lines)) <= 80
    assert re.match(r"ok  tokenizer +5 min +3 min  done", lines[1]) and "train.lr_schedule cosine" in lines[2]
    assert lines[-1] == "2 of 3 to run: dpar-cli run"
    assert graph_lines(states)[-1] == "report          <- train_dpar"


def test_status_marks_what_other_code_made(project):
    states = [state("data", "fresh", 1.0, code=HERE["source"]), state("tokenizer", "fresh", 1.0, code="0" * 16)]
    lines = status_lines(states, project, now=1300.0, code=HERE)
    assert lines[1].startswith("ok  data") and lines[2].startswith("ok* tokenizer")
    assert "made by different code (1.0, abcdef01)" in " ".join(lines[-1].split())


def test_status_fits_a_terminal_of_40_columns(project, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    why = "train.lr_schedule cosine -> constant, 7 more differ"
    lines = "\n".join(status_lines([state("train_dpar", "stale", 4000.0, why=why)], project, now=1300.0, code=HERE))
    assert max(map(len, lines.splitlines())) <= 40 and "constant" in lines


def test_the_command_line_answers_in_80_columns_and_knows_its_version(project):
    runner = CliRunner()
    for words in (["status"], ["status", "--graph"], ["params", "list"], ["-h"], ["run", "-h"], ["doctor", "-h"]):
        result = runner.invoke(app, words, env={"COLUMNS": "80", "NO_COLOR": "1"})
        assert result.exit_code == 0, result.output
        assert max(map(len, result.output.splitlines())) <= 80 and "\033" not in result.output, words
    assert re.fullmatch(r"dpar \d+\.\d+\S*\n", runner.invoke(app, ["--version"]).output)


def test_presets_are_listed_with_what_they_are_for():
    lines = preset_lines(ROOT)
    assert any(line.startswith("demo ") and "nine photographs" in line for line in lines)
    assert max(len(part) for line in lines for part in line.splitlines()) <= 80


def test_words_for_people(monkeypatch):
    assert [rate_words(rate, "step") for rate in (312.44, 1.0, 0.4, 0.0)] == [
        "312.4 step/s",
        "1.0 step/s",
        "2.5 s/step",
        "0.0 step/s",
    ]
    assert rate_words(0.25, "images") == "4.0 s/image" and rate_words(188_234_251.0, "bytes") == "188.2 MB/s"
    assert [duration(s) for s in (4, 151, 11100, 187200)] == ["4 s", "2 min 31 s", "3 h 05 min", "2 days 4 h"]
    assert [about(s) for s in (0.2, 39, 720, 7200)] == ["1 s", "39 s", "12 min", "2.0 h"]
    assert [size(n) for n in (264, 1.2e6, 5e8, 2.1e12)] == ["264 B", "1.2 MB", "0.5 GB", "2.1 TB"]
    assert shortened("abcdef", 4) == "abc…" and shortened("abc", 4) == "abc"
    assert colour("x", "red") == "x"
    assert max(map(len, wrapped("word " * 40, first="- ", rest="  ").splitlines())) <= 80

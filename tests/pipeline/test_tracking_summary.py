"""What a pipeline run shows in MLflow: name, short metrics, tags, note."""

import subprocess

from pipeline.tracking import summary
from tests.helpers.mlflow_stores import headline_of_a_run

HEADLINE = headline_of_a_run()


def test_the_name_and_the_note_tell_what_came_out():
    assert summary.run_name("demo", HEADLINE) == "demo · DPAR 2.79 / baseline 2.86 nats"
    note = summary.note("demo", HEADLINE)
    assert note.startswith("**No clear difference at equal steps.**") and "one seed" in note
    assert "| validation loss | 2.791 (2.7 to 2.9) | 2.862 (2.8 to 2.95) |" in note and "| recall | 0.5 | 0.4 |" in note
    assert "Speed of training: DPAR 1.07 times the baseline" in note and "Speed of sampling: the machine was busy" in note
    assert "`dpar-cli params use demo`" in note and "own params" not in summary.note("own params", HEADLINE)


def test_a_run_of_the_report_alone_has_the_headline_metrics_without_a_speed_in_doubt():
    losses = {"dpar_loss": 2.791, "baseline_loss": 2.862}
    assert summary.headline_metrics(HEADLINE) == {"training_speed": 1.07} | losses
    row = {"words": "fd_demo", "dpar": {"value": 5.5}, "baseline": {"value": 6.2}}
    rows = [*HEADLINE["verdicts"][0]["rows"], row]
    found = summary.headline_metrics(HEADLINE | {"verdicts": [{"rows": rows}]})
    assert found == {"training_speed": 1.07, "dpar_distance": 5.5, "baseline_distance": 6.2} | losses


def test_the_pipeline_run_gets_few_metrics_under_short_names():
    assert summary.short_metrics("train_dpar", {"train/loss": 2.0, "validation/loss": 2.5}) == {"dpar_loss": 2.5}
    twice = {"eval/fd_demo": 3.0, "eval/precision": 0.5, "equal_time/eval/fd_demo": 4.0}
    assert summary.short_metrics("score_llamagen", twice) == {"baseline_distance": 3.0}
    assert summary.short_metrics("score_dpar", {"eval/fid": 5.0}) == {"dpar_distance": 5.0}
    assert summary.short_metrics("data", {"data/classes": 9.0}) == {}


def test_children_sort_in_the_order_of_the_workflow():
    stages = ["data", "tokenizer", "score"]
    assert [summary.child_name(stage, stages) for stage in (*stages, "sweep")] == [
        "01 data",
        "02 tokenizer",
        "03 score",
        "sweep",
    ]


def test_the_commit_is_a_tag_and_a_changed_file_is_seen(tmp_path):
    assert "mlflow.source.git.commit" not in summary.source_tags(tmp_path, "dvc repro")
    for words in (["init", "-q"], ["config", "user.name", "a"], ["config", "user.email", "a@b"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "f").write_text("1")
    for words in (["add", "f"], ["commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = summary.source_tags(tmp_path, "dvc repro")
    assert len(clean["mlflow.source.git.commit"]) == 40 and not clean["dpar.git"].endswith("-dirty")
    (tmp_path / "f").write_text("2")
    assert summary.source_tags(tmp_path, "dvc repro")["dpar.git"].endswith("-dirty")

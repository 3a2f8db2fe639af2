"""What a pipeline run shows in MLflow: name, short metrics, tags, note."""

import subprocess

from pipeline.tracking import summary

HEADLINE = {
    "badge": "Demo: nine photographs, one seed.",
    "headline": "No clear difference at equal steps.",
    "verdicts": [
        {
            "title": "No clear difference at equal steps",
            "sentence": "All overlap.",
            "rows": [
                {
                    "words": "validation loss",
                    "dpar": {"value": 2.791, "interval": [2.7, 2.9]},
                    "baseline": {"value": 2.862, "interval": [2.8, 2.95]},
                },
                {"words": "recall", "dpar": {"value": 0.5, "interval": None}, "baseline": {"value": 0.4, "interval": None}},
            ],
        }
    ],
    "training_speed": {"ratio": 1.07, "doubt": ""},
    "sampling_speed": {"ratio": None, "doubt": "the machine was busy"},
}


def test_the_name_and_the_note_tell_what_came_out():
    assert summary.run_name("demo", HEADLINE) == "demo · DPAR 2.79 / baseline 2.86 nats"
    note = summary.note("demo", HEADLINE)
    assert note.startswith("**No clear difference at equal steps.**") and "one seed" in note
    assert "| validation loss | 2.791 (2.7 to 2.9) | 2.862 (2.8 to 2.95) |" in note and "| recall | 0.5 | 0.4 |" in note
    assert "Speed of training: DPAR 1.07 times the baseline" in note and "Speed of sampling: the machine was busy" in note
    assert "`dpar-cli params use demo`" in note and "own params" not in summary.note("own params", HEADLINE)


def test_a_speed_in_doubt_is_no_metric():
    assert summary.speed_metrics(HEADLINE) == {"training_speed": 1.07}


def test_the_pipeline_run_gets_few_metrics_under_short_names():
    assert summary.short_metrics("train_dpar", {"train/loss": 2.0, "validation/loss": 2.5}) == {"dpar_loss": 2.5}
    twice = {"eval/fd_demo/llamagen": 3.0, "eval/precision/llamagen": 0.5, "eval/fd_demo/llamagen_equal_time": 4.0}
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
    assert "mlflow.source.git.commit" not in summary.source_tags(tmp_path)
    for words in (["init", "-q"], ["config", "user.name", "a"], ["config", "user.email", "a@b"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "f").write_text("1")
    for words in (["add", "f"], ["commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = summary.source_tags(tmp_path)
    assert len(clean["mlflow.source.git.commit"]) == 40 and not clean["dpar.git"].endswith("-dirty")
    (tmp_path / "f").write_text("2")
    assert summary.source_tags(tmp_path)["dpar.git"].endswith("-dirty")

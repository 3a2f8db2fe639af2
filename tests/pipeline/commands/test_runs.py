"""`dpar-cli runs`: pipeline runs as a table, and what one changed."""

from types import SimpleNamespace

from pipeline.commands.runs import run_lines, show_lines


def run(name="demo · DPAR 2.79 / baseline 2.86 nats", **metrics):
    info = SimpleNamespace(run_id="0123456789abcdef", run_name=name, status="FINISHED", start_time=1_700_000_000_000)
    data = SimpleNamespace(metrics=metrics, params={"seed": "0", "train.steps": "480", "gone": "1"}, tags={})
    return SimpleNamespace(info=info, data=data)


def test_runs_are_a_table_of_80_columns():
    lines = run_lines(
        [run(dpar_loss=2.791, baseline_loss=2.862, training_speed=1.07), run("own params · 2026-11-27 16:40:12")]
    )
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("01234567  ") and "  2.79   2.86   1.07  demo" in lines[1]
    assert lines[2].endswith("own params")
    assert run_lines([]) == ["no pipeline run yet: dpar-cli run"]


def test_one_run_shows_its_metrics_and_the_params_that_differ():
    lines = show_lines(run(dpar_loss=2.791), {"seed": "0", "train.steps": "8"})
    assert lines[0] == "demo · DPAR 2.79 / baseline 2.86 nats  (FINISHED, 0123456789abcdef)"
    assert lines[1].split() == ["dpar_loss", "2.791"]
    assert lines[2:] == ["params that differ from params.yaml (run, params.yaml):", "  train.steps 480, 8"]
    assert show_lines(run(), {"seed": "0", "train.steps": "480"})[-1] == "params as in params.yaml"

"""Progress in a log: lines whose numbers a reader can trust."""

from stages.tracker import LineProgress


def test_work_that_takes_longer_than_planned_never_shows_more_than_all_of_it_nor_a_time_in_the_past(capsys):
    progress = LineProgress(12, "time training in turns", done=0, unit="s", interval=0.0)
    for _ in range(3):
        progress.advance(9)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in turns ")[1].split()[0] for line in lines] == ["9/12", "18/18", "27/27"]
    assert "100 %" in lines[-1] and "ETA 0:00:00" in lines[-1] and "-" not in lines[-1]

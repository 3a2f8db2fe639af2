"""Charts are well-formed SVG whose marks are where the numbers say."""

import re
import xml.etree.ElementTree as ET

import pytest

from pipeline.report.charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Dot,
    Series,
    bar_chart,
    difference_plot,
    dot_chart,
    graph,
    interval_plot,
    line_chart,
    ticks,
)


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(c.get("cx")), float(c.get("cy"))) for c in ET.fromstring(svg).iter("circle")]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.31, 2.39), (0, 480), (-3, 7), (1e-4, 3e-4), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert len(found) <= 6 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    if high > low:
        assert len(found) >= 2
        assert all(len(f"{t:g}") <= 7 for t in found)


def test_a_lower_loss_is_drawn_lower_and_later_steps_to_the_right():
    svg = line_chart([Series("DPAR", "dpar", [(10, 3.0), (20, 2.0), (40, 1.0)])], x="steps", y="loss")
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x0 < x1 < x2 == WIDTH - RIGHT
    assert y0 < y1 < y2 < HEIGHT
    assert x1 - LEFT == pytest.approx((WIDTH - RIGHT - LEFT) / 2, abs=0.1)


def test_steps_of_a_long_run_are_written_out():
    svg = line_chart([Series("DPAR", "dpar", [(750_684, 3.0), (1_501_368, 2.0)])], x="steps", y="loss")
    assert "2.0000 at 1,501,368 steps" in svg and ">1,500,000<" in svg and "e+" not in svg


def test_words_in_a_chart_are_escaped():
    svg = line_chart([Series("<b>&", "dpar", [(1, 1.0)])], x="a<b", y="c&d", marks={"<i>": 0.5})
    assert "<b>" not in svg and "a&lt;b" in svg
    ET.fromstring(svg)


def test_a_chart_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no chart: no curve"):
        line_chart([Series("DPAR", "dpar", [])], x="steps", y="loss")


def test_bars_are_as_high_as_their_values():
    svg = bar_chart([("1", 0.6), ("2", 0.3), ("3", 0.0)], x="length", y="share")
    heights = [float(r.get("height")) for r in ET.fromstring(svg).iter("rect")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2) and heights[2] == 0
    assert "60.0 %" in svg


def test_intervals_share_one_scale():
    svg = interval_plot([Dot("dpar", 1.0, (0.0, 2.0)), Dot("llamagen", 3.0, (2.0, 4.0)), Dot("llamagen", 2.0)], title="fd")
    (a, _), (b, _), (c, _) = circles(svg)
    assert (a + b) / 2 == pytest.approx(c, abs=0.1)
    first, second = re.findall(r'class="interval" d="M([\d.]+) [\d.]+H([\d.]+)"', svg)
    assert first[1] == second[0]
    assert [x for x, _ in circles(interval_plot([Dot("dpar", 5.0), Dot("llamagen", 5.0)], title="same"))] == [90.0, 90.0]


def test_a_graph_stands_below_what_it_needs_and_leaves_out_what_is_implied():
    edges = {"data": [], "tokens": ["data"], "train_dpar": ["data", "tokens"], "train_llamagen": ["tokens"]}
    tree = ET.fromstring(graph(edges, {"data": 1, "tokens": 1, "train_dpar": 1, "train_llamagen": 2}))
    tops = {g.find("text").text: float(g.find("rect").get("y")) for g in tree.iter("g")}
    assert tops["data"] < tops["tokens"] < tops["train_dpar"] == tops["train_llamagen"]
    assert len([p for p in tree.iter("path") if p.get("class") == "edge"]) == 3
    assert [g.get("class") for g in tree.iter("g")] == ["node shared", "node shared", "node dpar", "node llamagen"]


def test_differences_are_drawn_on_a_scale_that_shows_zero():
    rows = [("at equal steps", Dot("dpar", -0.1, (-0.2, -0.05))), ("at equal time", Dot("other", 0.1, None))]
    svg = difference_plot(rows, title="DPAR minus baseline")
    (left, top), (right, bottom) = circles(svg)
    zero = float(re.search(r'class="zero"><path class="axis" d="M([\d.]+) ', svg).group(1))
    assert top < bottom and left < zero < right and zero - left == pytest.approx(right - zero, abs=0.2)


def test_values_over_costs_are_drawn_with_their_names_and_equal_costs_apart():
    dots = [
        ("DPAR", 1.0, Dot("dpar", 10.0, (8.0, 12.0))),
        ("a<b", 2.0, Dot("llamagen", 20.0)),
        ("c", 2.0, Dot("other", 20.0)),
    ]
    svg = dot_chart(dots, x="GFLOPs", y="fd")
    (x0, y0), (x1, y1), (x2, _) = circles(svg)
    assert x0 < x1 < x2 and y0 > y1 and "a&lt;b" in svg and svg.count("interval") == 1


def test_a_fixed_scale_puts_equal_values_at_equal_places():
    plots = [
        interval_plot([Dot("dpar", 0.25), Dot("llamagen", end)], title="recall", scale=(0.0, 1.0)) for end in (0.3, 0.9)
    ]
    assert circles(plots[0])[0] == circles(plots[1])[0]

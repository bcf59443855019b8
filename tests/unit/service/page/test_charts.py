"""Drawings: what is in them, and that no figures break them."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

from hypothesis import example, given
from hypothesis import strategies as st

from kdscale.service.page.charts import Line, line_chart, smoothed, sparkline
from kdscale.service.page.curves import curves

finite = st.floats(-1e250, 1e250, allow_nan=False)
points = st.lists(st.tuples(finite, finite), min_size=1, max_size=40)


@given(st.lists(points, min_size=1, max_size=3), st.booleans(), st.booleans())
@example([[(0.0, 2.225073858507e-311)]], True, False)
def test_any_finite_points_are_drawn_inside_the_picture(
    lines: list[list[tuple[float, float]]], log: bool, dots: bool
) -> None:
    chart = line_chart("Loss", [Line(str(n), line, dots=dots) for n, line in enumerate(lines)], "step", log=log)
    assert chart is not None
    root = ET.fromstring(str(chart.svg))
    numbers = [float(text.get(name, "0")) for text in root.iter("text") for name in ("x", "y")]
    assert all(math.isfinite(number) and -20 <= number <= 400 for number in numbers)
    assert "nan" not in str(chart.svg)
    assert "inf" not in str(chart.svg)


def test_a_chart_says_in_words_what_it_shows() -> None:
    chart = line_chart("Loss", [Line("mean <b>", [(0, 4.0), (1000, 2.5)])], "step")
    assert chart is not None
    assert chart.alt == "Line chart of loss over step. mean <b>: from 4.00 to 2.50, now at 1k."
    assert line_chart("Loss", [Line("none", [])], "step") is None
    marked = line_chart("Loss", [Line("a", [(0, 1)], dots=True, mark="<script>")], "step")
    assert marked is not None
    assert "<script>" not in marked.svg


@given(st.lists(finite, max_size=200))
def test_sparklines_of_any_values(values: list[float]) -> None:
    drawn = sparkline(values)
    assert bool(drawn) == (len(values) > 1)
    if drawn:
        assert "nan" not in drawn
        ET.fromstring(str(drawn))


def test_smoothing_keeps_a_straight_line_and_the_ends() -> None:
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert all(math.isclose(a[1], b[1]) for a, b in zip(smoothed(line), line, strict=True))


def test_curves_stand_over_the_tokens_trained_on_and_keep_their_mean() -> None:
    steps = list(range(1, 5001))
    series = {
        "train/loss": (steps, [float(step) for step in steps]),
        "train/tokens": (steps, [10.0 * step for step in steps]),
        "validation/perplexity": ([0, 50, 5000], [140.0, 100.0, 90.0]),
    }
    found = curves(series)
    assert found.x_title == "training tokens"
    assert [x for x, _ in found.validation] == [0.0, 500.0, 50_000.0]
    assert len(found.loss) == 512
    assert found.loss[-1][0] == 50_000.0
    assert math.isclose(sum(y for _, y in found.loss) / 512, 2500.5, rel_tol=1e-3)
    assert curves({"train/loss": ([1, 2], [3.0, 2.0])}).x_title == "step"
    assert curves({}).charts() == []


def test_words_beside_dots_do_not_cover_each_other() -> None:
    near = [Line(str(n), [(5.0, 50.0 + n)], dots=True, mark="Distilled") for n in range(3)]
    chart = line_chart("Quality", [*near, Line("far", [(9.0, 100.0)], dots=True, mark="Teacher")], "size")
    assert chart is not None
    places = [
        float(text.get("y", "")) for text in ET.fromstring(str(chart.svg)).iter("text") if text.text == "Distilled"
    ]
    assert [b - a >= 12 for a, b in itertools.pairwise(places)] == [True, True]


def test_charts_of_a_run_have_one_axis() -> None:
    series = {
        "train/loss": ([1, 2], [3.0, 2.0]), "train/tokens": ([1, 2], [100.0, 200.0]),
        "validation/perplexity": ([0], [140.0]),
    }  # fmt: skip
    loss, validation = curves(series).charts()
    for chart in (loss, validation):
        words = [text.text for text in ET.fromstring(str(chart.svg)).iter("text")]
        assert (words[-1], "0" in words) == ("200", True)

"""Which models no other beats, and plots whose labels can be read."""

from __future__ import annotations

import re
from itertools import combinations, product
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kdscale.report.tradeoff import plots
from kdscale.report.tradeoff.points import (
    ACCURACY,
    COSTS,
    PERPLEXITY,
    QUALITIES,
    SIZE,
    SPEED,
    Point,
    as_json,
    from_json,
    front,
    points_of,
)  # fmt: skip


def point(name: str, perplexity: float, weight_bytes: int, **more: Any) -> Point:
    return Point(label=name, name=name, run="", perplexity=perplexity, weight_bytes=weight_bytes, **more)


POINTS = [point("teacher", 10, 300), point("pruned", 40, 150), point("distilled", 20, 150), point("int8", 21, 80)]


def test_the_front_leaves_out_what_another_beats() -> None:
    assert [p.name for p in front(POINTS, PERPLEXITY, SIZE)] == ["int8", "distilled", "teacher"]
    assert front(POINTS, ACCURACY, SIZE) == []
    assert [row["on_front_of"] for row in as_json(POINTS)][:2] == [["perplexity/weight_bytes"], []]
    assert from_json(as_json(POINTS)) == POINTS


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8))
def test_nothing_on_the_front_is_beaten_and_all_else_is(values: list[tuple[int, int]]) -> None:
    points = [Point(str(i), str(i), "", accuracy=q / 10, decode_tokens_per_second=s) for i, (q, s) in enumerate(values)]
    kept = front(points, ACCURACY, SPEED)

    def beats(one: Point, other: Point) -> bool:
        pairs = [(getattr(one, m.key), getattr(other, m.key)) for m in (ACCURACY, SPEED)]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    for one in points:
        assert (one not in kept) == any(beats(other, one) for other in points)


def test_points_come_from_what_was_measured() -> None:
    evaluation = {"models": {
        "teacher": {
            "quality": {"perplexity": 9.0}, "size": {"weight_bytes": 5},
            "efficiency": {"decode_tokens_per_second": 3.0},
        },
        "int4_rtn_g32": {"quality": {"perplexity": 12.0}, "size": {"weight_bytes": 2}},
    }}  # fmt: skip
    teacher, packed = points_of(evaluation, {"teacher": 0.5}, run="a")
    assert teacher == Point("a: Teacher", "teacher", "a", 9.0, 0.5, 5, 3.0)
    assert packed == Point("a: INT4 RTN g32", "int4_rtn_g32", "a", 12.0, None, 2, None)
    assert points_of(None) == []


def test_a_plot_for_size_and_one_for_speed_with_a_panel_for_each_quality() -> None:
    many = [
        Point(f"run {run}: {name}", name, f"run {run}", 10.0 + run, 0.5, 100 - run, 9.0)
        for run, name in product(range(6), ("teacher", "pruned"))
    ]
    found = plots.tradeoffs(many)
    assert [plot.title for plot in found] == ["Quality against size", "Quality against speed"]
    for plot in found:
        assert plot.wide.count("<svg") == 1 and plot.wide.count("is better)") == 4
        assert set(re.findall(r">(run \d: \w+)<", plot.wide)) == {p.label for p in many}
        assert "#0" not in re.sub(r"href=\"#[^\"]*\"|url\(#[^)]*\)", "", plot.wide)
    assert [plot.wide for plot in plots.tradeoffs(many)] == [plot.wide for plot in found]
    assert plots.tradeoffs(many[:1]) == []
    assert len(QUALITIES) * len(COSTS) == 4


def test_labels_of_points_beside_each_other_do_not_cover_each_other() -> None:
    pixels = [(200.0 + 3 * i, 150.0 + 2 * i) for i in range(4)]
    labels = ["run one: Distilled"] * 4
    places = plots._label_places(labels, pixels, (700, 300))
    boxes = [
        plots._box(label, x + right, y + up, side)
        for label, (x, y), (right, up, side) in zip(labels, pixels, places, strict=True)
    ]
    assert [plots._overlap(one, other) for one, other in combinations(boxes, 2)] == [0] * 6

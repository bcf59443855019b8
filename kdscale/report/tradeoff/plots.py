"""Quality against size and against speed, a point for each model; the front is a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kdscale.report.comparison import written
from kdscale.report.svg import ACCENT, AFTER, BEFORE, INK, MUTED, Plot, make_plot, style
from kdscale.report.tradeoff.points import COSTS, QUALITIES, SIZE, Measure, Point, front, with_both
from kdscale.runs.models import DISTILLED, PRUNED, START, TEACHER
from kdscale.units import compact_size

_COLOURS = {TEACHER: BEFORE, PRUNED: ACCENT, START: ACCENT, DISTILLED: AFTER}
_MARKERS = "osD^vP*X<>"
_LABEL, _LINE = 5.2, 13.0  # pixels of a letter and of a line of a label
_PLACES = ((6, 5, "left"), (6, -13, "left"), (-6, 5, "right"), (-6, -13, "right"), (6, 18, "left"), (6, -26, "left"),
           (-6, 18, "right"), (-6, -26, "right"), (6, 31, "left"), (6, -39, "left"))  # fmt: skip


def tradeoffs(points: Sequence[Point]) -> list[Plot]:
    """Quality against size, and against speed: those of which at least two models have both figures."""
    plots = []
    for cost in COSTS:
        panels = [(quality, with_both(points, quality, cost)) for quality in QUALITIES]
        panels = [(quality, found) for quality, found in panels if len(found) > 1]
        if panels:
            plots.append(_plot(panels, cost))
    return plots


def _plot(panels: Sequence[tuple[Measure, Sequence[Point]]], cost: Measure) -> Plot:
    markers = _markers([point.run for _, points in panels for point in points])
    size = (880, 340) if len(panels) > 1 else (880, 380)
    small = (350, 320 * len(panels))

    def draw(figure: Any, narrow: bool) -> None:
        grid = (len(panels), 1) if narrow else (1, len(panels))
        width, height = small if narrow else size
        room = width / grid[1] - 90, height / grid[0] - 80
        for number, (quality, points) in enumerate(panels, 1):
            axes = figure.add_subplot(*grid, number)
            _draw(axes, points, quality, cost, markers, room)

    told = "; ".join(
        f"{point.label}: {_told(point, quality)}, {_told(point, cost)}"
        for quality, points in panels
        for point in points
    )
    what = "size" if cost is SIZE else "speed"
    good = "Left" if cost.better == "lower" else "Right"
    return make_plot(
        f"Quality against {what}",
        f"{good} and towards the better quality is better. The line and the full marks are the front: models that no"
        " other beats in both.",
        f"Scatter plots. {told}.",
        draw,
        size,
        small,
    )


def _told(point: Point, measure: Measure) -> str:
    return f"{measure.title.lower()} {written(getattr(point, measure.key), measure.form)}"


def _markers(runs: Sequence[str]) -> dict[str, str]:
    """A marker for each run, in their order; many runs share markers, and labels tell them apart."""
    return {run: _MARKERS[index % len(_MARKERS)] for index, run in enumerate(dict.fromkeys(runs))}


def _draw(
    axes: Any,
    points: Sequence[Point],
    quality: Measure,
    cost: Measure,
    markers: dict[str, str],
    room: tuple[float, float],
) -> None:
    x = [float(getattr(point, cost.key)) for point in points]
    y = [float(getattr(point, quality.key)) for point in points]
    x_limits, y_limits = _limits(x, 0.14), _limits(y, 0.12)
    axes.set_xlim(*x_limits)
    axes.set_ylim(*y_limits)
    kept = front(points, quality, cost)
    axes.plot(
        [getattr(p, cost.key) for p in kept], [getattr(p, quality.key) for p in kept], color=MUTED, linewidth=1,
        linestyle=(0, (4, 3)), zorder=1,
    )  # fmt: skip
    for point, at_x, at_y in zip(points, x, y, strict=True):
        axes.plot(
            [at_x], [at_y], marker=markers[point.run], markersize=7 if point in kept else 6, linestyle="",
            color=_COLOURS.get(point.name, MUTED), markerfacecolor=None if point in kept else "none", zorder=2,
        )  # fmt: skip
    pixels = [
        (_position(at_x, x_limits) * room[0], _position(at_y, y_limits) * room[1])
        for at_x, at_y in zip(x, y, strict=True)
    ]
    for point, at_x, at_y, place in zip(
        points, x, y, _label_places([p.label for p in points], pixels, room), strict=True
    ):
        right, up, side = place
        axes.annotate(
            point.label, (at_x, at_y), xytext=(right, up), textcoords="offset points", ha=side, va="bottom",
            fontsize=9.5, color=INK, parse_math=False,  # a run's name is no formula
        )  # fmt: skip
    style(axes)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_title(f"{quality.title} ({quality.better} is better)", loc="left")
    axes.set_xlabel(f"{cost.title.lower()} ({cost.better} is better)")
    axes.xaxis.set_major_formatter(_ticks(compact_size if cost is SIZE else lambda value: f"{value:.4g}"))
    axes.yaxis.set_major_formatter(
        _ticks(lambda value: f"{100 * value:.3g} %" if quality.form == "percent" else f"{value:.4g}")
    )


def _limits(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Linear limits around all values, with room for labels."""
    low, high = min(values), max(values)
    width = (high - low) or abs(high) or 1.0
    return low - margin * width, high + margin * width


def _position(value: float, limits: tuple[float, float]) -> float:
    return (value - limits[0]) / (limits[1] - limits[0])


def _label_places(
    labels: Sequence[str], pixels: Sequence[tuple[float, float]], room: tuple[float, float]
) -> list[tuple[int, int, str]]:
    """Where each label goes: the first place at which it stays inside and covers no point and no other label."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    places: dict[int, tuple[int, int, str]] = {}
    for index in sorted(range(len(labels)), key=lambda index: -pixels[index][1]):  # from the top, as they are read
        label, (x, y) = labels[index], pixels[index]
        boxes = [_box(label, x + right, y + up, side) for right, up, side in _PLACES]
        bad = [_outside(box, room) + sum(_overlap(box, other) for other in taken) for box in boxes]
        best = bad.index(min(bad))
        taken.append(boxes[best])
        places[index] = _PLACES[best]
    return [places[index] for index in range(len(labels))]


Box = tuple[float, float, float, float]


def _box(label: str, x: float, y: float, side: str) -> Box:
    width = _LABEL * len(label)
    left = x if side == "left" else x - width
    return left, y, left + width, y + _LINE


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, room: tuple[float, float]) -> float:
    beyond = max(0.0, -box[0]) + max(0.0, box[2] - room[0]) + max(0.0, -box[1]) + max(0.0, box[3] - room[1])
    return _LINE * beyond


def _ticks(text: Callable[[float], str]) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: text(value))

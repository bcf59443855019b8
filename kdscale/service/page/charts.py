"""Line charts and sparklines as plain SVG, coloured by classes of the page's style sheet.

matplotlib, which draws the report, takes a quarter of a second for a figure and writes style attributes, which the
page's content policy refuses. These take a millisecond, so that a page can be drawn again every second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from kdscale.units import compact_count, format_number

Point = tuple[float, float]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 8, 8, 26  # margins, with the labels of the axes in them
_SPARK_WIDTH, _SPARK_HEIGHT, _SPARK_POINTS = 96, 24, 48
_MARK_HEIGHT, _MARK_WIDTH = 13, 60
_SHOWN = 0.985  # of the values decide the scale: a first, far-off step or two may leave it


@dataclass(frozen=True)
class Line:
    """One line of a chart. `css` is the class that colours it; `faint` lines lie behind the others."""

    label: str
    points: Sequence[Point]
    css: str = "line-a"
    faint: bool = False
    dots: bool = False
    mark: str = ""  # beside the last point


@dataclass(frozen=True)
class Chart:
    """A drawing, and what it shows in words."""

    title: str
    alt: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()  # class and label of each line, where there are several


def line_chart(
    title: str, lines: Sequence[Line], x_title: str, *, log: bool = False, until: float = 0.0
) -> Chart | None:
    """Lines over one x axis; None where there is no point. `log` is taken back where a value is not above 0.

    `until`: the x axis goes from 0 to here at least, so that charts beside each other have one.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    log = log and all(y > 0 for line in lines for _, y in line.points)
    scale: Callable[[float], float] = math.log10 if log else float
    x_low, x_high = _range([x for line in lines for x, _ in line.points] + ([0.0, until] if until > 0 else []))
    if any(line.dots for line in lines):
        room = 0.02 * (x_high - x_low)
        x_low, x_high = x_low - room, x_high + room
    y_low, y_high = _y_range([[scale(y) for _, y in line.points] for line in lines])
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (x - x_low) / (x_high - x_low) * width, (1 - (scale(y) - y_low) / (y_high - y_low)) * height

    parts = []
    for value in _y_ticks(y_low, y_high, log):
        y = _TOP + at(x_low, value)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}h{width}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_y_text(value)}</text>')
    for value in _ticks(x_low, x_high, 4):
        x = _LEFT + (value - x_low) / (x_high - x_low) * width
        anchor = "start" if x < _LEFT + 12 else "end" if x > _WIDTH - 24 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 9}" text-anchor="{anchor}">{compact_count(value, 4)}</text>')
    marks: list[tuple[float, float, str]] = []
    # an inner svg cuts off what leaves the scale
    parts.append(f'<svg x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}">')
    for line in sorted(lines, key=lambda line: not line.faint):
        places = [at(x, y) for x, y in line.points]
        if len(places) > 1:
            css = f"{line.css} faint" if line.faint else line.css
            parts.append(f'<path class="{css}" d="{_path(places)}"/>')
        if line.dots or len(places) == 1:
            parts += [f'<circle class="{line.css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        if line.mark:
            marks.append((*places[-1], line.mark))
    parts += _marks(marks, width)
    parts.append("</svg>")
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'
    told = [line for line in lines if not line.faint]
    return Chart(
        title,
        f"Line chart of {title.lower()} over {x_title}. {' '.join(map(_in_words, told))}",
        Markup(svg),
        tuple((line.css, line.label) for line in told) if len(told) > 1 else (),
    )


def sparkline(values: Sequence[float]) -> Markup:
    """A small line without axes, and the last value in words; empty with fewer than two values."""
    if len(values) < 2:
        return Markup("")
    every = -(-len(values) // _SPARK_POINTS)
    means = [sum(part) / len(part) for part in (values[i : i + every] for i in range(0, len(values), every))]
    low, high = _y_range([means])
    places = [
        (i * _SPARK_WIDTH / max(1, len(means) - 1), (1 - (y - low) / (high - low)) * _SPARK_HEIGHT)
        for i, y in enumerate(means)
    ]
    alt = f"Loss from {values[0]:.3g} to {values[-1]:.3g}"
    return Markup(
        f'<svg class="spark" viewBox="0 0 {_SPARK_WIDTH} {_SPARK_HEIGHT}" role="img" aria-label="{alt}"'
        f' preserveAspectRatio="none"><path class="line-a" d="{_path(places)}"/></svg>'
    )


def smoothed(points: Sequence[Point], share: float = 0.04) -> list[Point]:
    """The mean of the `share` of the points around each; fewer, but as many on both sides, near the ends."""
    reach = max(2, round(share * len(points) / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        out.append((x, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)))
    return out


def _marks(marks: Sequence[tuple[float, float, str]], width: float) -> list[str]:
    """Words beside points, each below those that would cover it."""
    parts = []
    placed: list[tuple[float, float]] = []
    for x, at, words in sorted(marks, key=lambda mark: mark[1]):
        side, anchor = (-7, "end") if x > width / 2 else (7, "start")
        y = max(_MARK_HEIGHT - 1.0, at + 4)
        while any(abs(y - other_y) < _MARK_HEIGHT and abs(x - other_x) < _MARK_WIDTH for other_x, other_y in placed):
            y += _MARK_HEIGHT
        placed.append((x, y))
        parts.append(f'<text x="{x + side:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')
    return parts


def _in_words(line: Line) -> str:
    first, last = line.points[0][1], line.points[-1][1]
    return f"{line.label}: from {_y_text(first)} to {_y_text(last)}, now at {compact_count(line.points[-1][0], 4)}."


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    reach = abs(low) * 0.1 or 1.0
    return low - reach, high + reach


def _y_range(lines: Sequence[Sequence[float]]) -> tuple[float, float]:
    """What the y axis shows: all values, without the far-off few at the top of a long line, and a little room."""
    highest = [sorted(line)[int(_SHOWN * (len(line) - 1))] if len(line) >= 20 else max(line) for line in lines]
    low, high = _range([*(min(line) for line in lines), *highest])
    room = 0.06 * (high - low)
    return low - room, high + room


def _y_ticks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        return _ticks(low, high, 5)
    decades = range(math.floor(low), math.ceil(high) + 1)
    found = [lead * 10.0**decade for decade in decades for lead in (1, 2, 5)]
    # a tick below the smallest number is 0
    shown = [value for value in found if value > 0 and low <= math.log10(value) <= high]
    if len(shown) > 6:
        shown = [value for value in shown if f"{value:e}"[0] == "1"]
    return shown if len(shown) > 1 else [value for value in _ticks(10**low, 10**high, 4) if value > 0]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round values (1, 2 or 5 times a power of ten apart) between `low` and `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(lead for lead in (1, 2, 5, 10) if (high - low) / (step * lead) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _y_text(value: float) -> str:
    return compact_count(value, 3) if abs(value) >= 1000 else format_number(float(f"{value:.3g}"))

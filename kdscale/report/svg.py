"""From a drawing to inline SVG that takes its colours and fonts from the page around it.

matplotlib draws with stand-in colours that are then replaced by CSS variables, so that one drawing serves the light and
the dark scheme. Text stays text. Equal drawings give equal bytes.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdscale.units import compact_count

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
BEFORE, AFTER, ACCENT = "#050505", "#060606", "#070707"

_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PAPER: "var(--card)",
    BEFORE: "var(--teacher)",
    AFTER: "var(--distilled)",
    ACCENT: "var(--pruned)",
}

_INCH = 72.0


@dataclass(frozen=True)
class Plot:
    """One figure of the report: both drawings, and what they show in words."""

    title: str
    caption: str
    alt: str
    wide: str
    narrow: str


def make_plot(
    title: str,
    caption: str,
    alt: str,
    draw: Callable[[Any, bool], None],
    wide: tuple[int, int],
    narrow: tuple[int, int],
) -> Plot:
    """Draw twice: `wide` and `narrow` are sizes in CSS pixels; `draw` gets a figure and whether it is narrow."""
    return Plot(title, caption, alt, _svg(draw, wide, False), _svg(draw, narrow, True))


def style(axes: Any, grid: bool = True) -> None:
    """The look all plots share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")
    axes.tick_params(length=3)
    if grid:
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)


def integers(most: int) -> Any:
    """A locator of at most `most` whole-number ticks."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True)


def count_formatter() -> Any:
    """Ticks such as `250k` and `1.5M`."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: compact_count(value, digits=4))


def _svg(draw: Callable[[Any, bool], None], size: tuple[int, int], narrow: bool) -> str:
    """Draw at `size` in CSS pixels and make the SVG fit for a page: no metadata, no foreign ids, colours from CSS."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kdscale",
        "font.size": 10.5,
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "axes.titlecolor": INK,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "grid.color": GRID,
        "figure.constrained_layout.use": True,
    }
    stream = io.StringIO()
    # rc_context from matplotlib's own defaults: a user's matplotlibrc must not change the report.
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(style)
        figure = Figure(figsize=(size[0] / _INCH, size[1] / _INCH), facecolor="none")
        FigureCanvasSVG(figure)
        draw(figure, narrow)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _for_page(stream.getvalue())


def _for_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    # Fonts come from the page; and ids must be unique over all plots of a page.
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    salt = f"{zlib.crc32(svg.encode()):08x}"
    return re.sub(r'(id="|href="#|url\(#)', lambda match: f"{match[1]}p{salt}-", svg)

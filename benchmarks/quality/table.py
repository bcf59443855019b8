"""What the cells of the bench say, as Markdown tables and a plot.

    python benchmarks/quality/table.py                                   of benchmarks/results/quality
    python benchmarks/quality/table.py --page PAGE --plot plot.svg

Seeds are averaged: geometric mean of the ratio to the teacher's perplexity, over the seeds that a budget was measured
with. Stale cells (cells.py) are named and left out. --page replaces what stands between the page's two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from cells import METHODS, SHAPES, Cell, Setup, read_cells, read_setups, stale
from curves import geometric_mean, in_thousands, mean_curve, recipe_needs, times_fewer

from kdscale.files import write_text

OURS, RECIPE = METHODS
TEXTS = ("known", "other")
BEGIN, END = "<!-- from the cells: benchmarks/quality/table.py -->", "<!-- end of what the cells say -->"
_RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality"
_COLOURS = {OURS: "#2a78d6", RECIPE: "#d6622a"}

Figures = dict[Cell, Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=_RESULTS, help="folder of the cells")
    parser.add_argument("--page", type=Path, help="a page with the two marks; without it, the tables are printed")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw")
    arguments = parser.parse_args()
    cells = list(read_cells(arguments.results))
    if not cells:
        raise SystemExit(f"{arguments.results} has no cells yet: benchmarks/quality/run.py measures them")
    why = stale(cells, read_setups())
    current = {cell: figures for cell, figures in cells if cell.name not in why}
    text = tables(current, why)
    if arguments.page is None:
        print(text)
    else:
        write_text(arguments.page, with_tables(arguments.page.read_text(encoding="utf-8"), text))
    if arguments.plot is not None:
        draw_plot(current, arguments.plot)


def with_tables(page: str, text: str) -> str:
    """The page with `text` between its marks. Raises SystemExit for a page without them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"the page needs one line {BEGIN} and one {END}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.split(END)[1]}"


def tables(current: Figures, why: Mapping[str, str]) -> str:
    """Both tables, and which cells are stale."""
    parts = [fewer_tokens(current), students(current)]
    if why:
        parts.append(
            "Stale cells, left out: " + "; ".join(f"`{name}` ({reason})" for name, reason in why.items()) + "."
        )
    if current:
        parts.append("Commits: " + ", ".join(f"`{one}`" for one in sorted({row["commit"] for row in current.values()})))
    return "\n\n".join(parts)


def pairs(current: Figures) -> list[tuple[str, str]]:
    """(teacher, shape) of all cells, in the bench's order."""
    found = {(cell.teacher, cell.shape) for cell in current}
    return sorted(found, key=lambda pair: (list_of_teachers(current).index(pair[0]), SHAPES.index(pair[1])))


def list_of_teachers(current: Figures) -> list[str]:
    """In the order of their sizes file, so that the small one comes first."""
    order: Mapping[str, Setup] = read_setups()
    return sorted({cell.teacher for cell in current}, key=lambda name: (name not in order, list(order).index(name)))


def curve(current: Figures, teacher: str, shape: str, method: str, text: str) -> list[tuple[int, float]]:
    """(tokens, ratio to the teacher's perplexity)."""
    by_seed: dict[int, dict[int, float]] = {}
    for cell, figures in current.items():
        if (cell.teacher, cell.shape, cell.method) == (teacher, shape, method):
            by_seed.setdefault(cell.seed, {})[cell.tokens] = figures[text]["ratio"]
    return mean_curve(list(by_seed.values()))


def fewer_tokens(current: Figures) -> str:
    """How many times fewer tokens, by shape and budget."""
    budgets = sorted({cell.tokens for cell in current})
    trained = [tokens for tokens in budgets if tokens]
    head = ["teacher", "shape", *(f"recipe at {in_thousands(tokens)}" for tokens in trained)]
    head += [f"ours at {in_thousands(tokens)}" for tokens in budgets]
    rows = []
    for teacher, shape in pairs(current):
        curves = {
            (method, text): curve(current, teacher, shape, method, text) for method in (OURS, RECIPE) for text in TEXTS
        }

        def both(say: Callable[..., str], tokens: int, curves: Mapping[Any, Any] = curves) -> str:
            said = [say(curves[RECIPE, text], curves[OURS, text], tokens) for text in TEXTS]
            return said[0] if said[0] == said[1] else " · ".join(said)

        rows.append(
            [teacher, shape]
            + [both(times_fewer, tokens) for tokens in trained]
            + [both(recipe_needs, tokens) for tokens in budgets]
        )
    return markdown(head, rows)


def students(current: Figures) -> str:
    """Quality and time of the students, ours and the recipe's in each cell."""
    head = ["teacher", "shape", "tokens", "seeds", *_COLUMNS]
    rows = []
    for teacher, shape in pairs(current):
        of_pair = {cell for cell in current if (cell.teacher, cell.shape) == (teacher, shape)}
        for tokens in sorted({cell.tokens for cell in of_pair}):
            sides = [
                [current[cell] for cell in sorted(of_pair) if (cell.method, cell.tokens) == (method, tokens)]
                for method in (OURS, RECIPE)
            ]
            row = [teacher, shape, in_thousands(tokens), " / ".join(str(len(side)) for side in sides)]
            for say in _COLUMNS.values():
                row.append(" / ".join(say(side) if side else "–" for side in sides))
            rows.append(row)
    return markdown(head, rows)


def _ratio(text: str) -> Callable[[Sequence[Any]], str]:
    return lambda side: f"{geometric_mean([one[text]['ratio'] for one in side]):.3g}×"


def _mean(*path: str, scale: float = 1.0, form: str = ".3g") -> Callable[[Sequence[Any]], str]:
    def say(side: Sequence[Any]) -> str:
        values = [reduce(getitem, path, one) for one in side]
        return format(scale * sum(values) / len(values), form)

    return say


def _minutes(side: Sequence[Any]) -> str:
    taken = [sum(one["seconds"][stage]["processor"] for stage in one["seconds"] if stage != "measure") for one in side]
    return f"{sum(taken) / len(taken) / 60:.1f}"


_COLUMNS: dict[str, Callable[[Sequence[Any]], str]] = {
    "known kinds": _ratio("known"),
    "other kinds": _ratio("other"),
    "KL, other": _mean("other", "kl"),
    "agreement, other, %": _mean("other", "agreement", scale=100, form=".1f"),
    "accuracy, %": _mean("accuracy", "value", scale=100, form=".1f"),
    "processor min": _minutes,
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def draw_plot(current: Figures, path: Path) -> None:
    """Perplexity over the teacher's against tokens: a row of panels for each teacher, a panel for each shape.

    Shapes of which only one side is measured have none.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    teachers = list_of_teachers(current)
    budgets = sorted({cell.tokens for cell in current})
    sides = {(cell.shape, cell.method) for cell in current}
    shapes = [shape for shape in SHAPES if {(shape, OURS), (shape, RECIPE)} <= sides]
    if not shapes:
        raise SystemExit("no shape has a cell of ours and one of the recipe: there is nothing to compare in a plot")
    with mpl.rc_context({"svg.hashsalt": "kdscale", "font.size": 9}):
        figure = Figure(figsize=(max(4.6, 2.3 * len(shapes)), 2.5 * len(teachers) + 0.5), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(len(teachers), len(shapes), squeeze=False)
        for row, teacher in zip(panels, teachers, strict=True):
            for axes, shape in zip(row, shapes, strict=True):
                for method in (OURS, RECIPE):
                    for text, line in zip(TEXTS, ("-", "--"), strict=True):
                        if points := curve(current, teacher, shape, method, text):
                            tokens, ratios = zip(*points, strict=True)
                            axes.plot(
                                [max(at, 10_000) for at in tokens], ratios, f"o{line}", markersize=3,
                                color=_COLOURS[method], label=f"{method}, {text} kinds",
                            )  # fmt: skip
                axes.set(xscale="log", yscale="log", xlim=(8_000, max(*budgets, 30_000) * 1.3))
                axes.set_title(f"{teacher}\n{shape}", fontsize=8.5)
                axes.xaxis.set_major_locator(FixedLocator([10_000, 30_000, 100_000, 300_000, 1_000_000]))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: "0" if at == 10_000 else in_thousands(at)))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}×"))
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.spines[["top", "right"]].set_visible(False)
                axes.grid(axis="y", linewidth=0.4)
        for axes in panels[-1]:
            axes.set_xlabel("tokens of distillation")
        for row in panels:
            row[0].set_ylabel("perplexity / teacher's")
        handles = {label: handle for row in panels for axes in row
                   for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
        columns = 4 if len(shapes) > 3 else 2  # four are wider than three panels
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

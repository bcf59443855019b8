"""The plots of the section on bias: the figure with the verdict, of all items and each group, beside its ideal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdscale.report.svg import ACCENT, AFTER, BEFORE, INK, MUTED, Plot, make_plot, style
from kdscale.runs.models import DISTILLED, PRUNED, START, TEACHER, model_title

_COLOURS = {TEACHER: BEFORE, PRUNED: ACCENT, START: ACCENT, DISTILLED: AFTER}  # other models are in the tables
_FEWEST_ITEMS = 10  # of a group that is drawn; smaller ones are in the tables
_MARKERS = {TEACHER: "o", PRUNED: "s", START: "s", DISTILLED: "D"}


def by_group(facts: Mapping[str, Any]) -> list[Plot]:
    """One plot for each measure that has groups with the figure."""
    if not facts["bias"]:
        return []
    plots = [_plot(measure) for measure in facts["bias"]["measures"]]
    return [plot for plot in plots if plot is not None]


def _plot(measure: Mapping[str, Any]) -> Plot | None:
    groups = [
        group
        for group in measure["groups"]
        if group["items"] >= _FEWEST_ITEMS and all(cell["value"] is not None for cell in group["cells"].values())
    ]
    if not groups or measure["ideal"] is None:
        return None
    everything = next(row["cells"] for row in measure["rows"] if row["headline"])
    rows = [("all", measure["items"], everything), *((one["name"], one["items"], one["cells"]) for one in groups)]
    models = [name for name in _COLOURS if name in everything]

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        axes.axvline(measure["ideal"], color=MUTED, linewidth=1, linestyle="--")
        for number, name in enumerate(models):
            shift = 0.2 * (number - (len(models) - 1) / 2)
            points = [
                (cells[name]["value"], len(rows) - 1 - at - shift, cells[name]["error"] or 0.0)
                for at, (_, _, cells) in enumerate(rows)
            ]
            x, y, error = zip(*points, strict=True)
            axes.errorbar(
                x, y, xerr=error, color=_COLOURS[name], marker=_MARKERS[name], markersize=4.5, linestyle="none",
                linewidth=1.2, label=model_title(name),
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [_label(name, count, narrow) for name, count, _ in reversed(rows)])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel(measure["figure"] if not narrow else measure["figure"].partition(",")[0][:44])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.55 / len(rows)), ncols=len(models), frameon=False,
                    fontsize=9.5, handletextpad=0.2, columnspacing=1.2)  # fmt: skip
        axes.margins(y=0.04)
        style(axes)

    worst = max(rows, key=lambda row: abs(row[2][models[-1]]["value"] - measure["ideal"]))
    height = 96 + 30 * len(rows)
    return make_plot(
        measure["title"],
        f"Groups of {_FEWEST_ITEMS} items or more. Bars: one standard error; dashed line: a model without bias.",
        f"Dot plot of “{measure['figure']}” for {len(rows) - 1} groups; the {model_title(models[-1]).lower()} model is "
        f"farthest from {measure['ideal']:g} for {worst[0]}.",
        draw,
        (880, height),
        (350, height),
    )


def _label(name: str, count: int, narrow: bool) -> str:
    most = 16 if narrow else 40
    # a group's name is text of a file: no dollar sign may begin a formula
    short = (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")
    return short if narrow else f"{short} ({count:,})"

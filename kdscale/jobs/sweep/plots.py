"""The plots of a sweep: what each trial reached, which values reached it, and quality against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdscale.report.svg import ACCENT, AFTER, BEFORE, Plot, count_formatter, integers, make_plot, style

_PANELS_A_ROW = 3


def progress(facts: Mapping[str, Any]) -> Plot | None:
    """The figure of each trial in the order of the trials, and the best so far; None without a finished trial."""
    points = _complete(facts)
    if not points:
        return None
    better = min if facts["minimize"] else max
    best = [better(value for _, value in points[: count + 1]) for count in range(len(points))]

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        axes.plot([number for number, _ in points], best, color=AFTER, drawstyle="steps-post", label="best so far")
        axes.scatter(*zip(*points, strict=True), color=BEFORE, zorder=3, label="a trial")
        style(axes)
        axes.set_xlabel("trial")
        axes.set_ylabel(facts["objective_title"])
        axes.xaxis.set_major_locator(integers(6 if narrow else 12))
        axes.legend(frameon=False)

    alt = f"{len(points)} finished trials; {facts['objective_title']} from {best[0]:.4g} to {best[-1]:.4g} at best."
    return make_plot("Trials", "Trials that ended early or failed are left out.", alt, draw, (880, 290), (350, 260))


def by_field(facts: Mapping[str, Any]) -> Plot | None:
    """The figure against the values of each field, one panel a field; None without a finished trial."""
    done = [trial for trial in facts["trials"] if trial["state"] == "complete"]
    if not done:
        return None
    fields = list(facts["fields"])

    def draw(figure: Any, narrow: bool) -> None:
        columns = 1 if narrow else min(_PANELS_A_ROW, len(fields))
        rows = -(-len(fields) // columns)
        for number, field in enumerate(fields, 1):
            axes = figure.add_subplot(rows, columns, number)
            values = [trial["draw"][field] for trial in done]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                axes.scatter(values, [trial["value"] for trial in done], color=BEFORE)
                if facts["fields"][field].get("log"):
                    axes.set_xscale("log")
                    axes.xaxis.set_minor_formatter("")  # labels between the decades would run into each other
                    if max(values) < 10 * min(values):  # no two decades: the ends say where the values are
                        axes.set_xticks([min(values), max(values)], [f"{min(values):.2g}", f"{max(values):.2g}"])
            else:
                names = sorted({str(value) for value in values})
                axes.scatter([names.index(str(value)) for value in values], [t["value"] for t in done], color=BEFORE)
                axes.set_xticks(range(len(names)), names)
            style(axes)
            axes.set_title(field, loc="left")
            if (number - 1) % columns == 0:
                axes.set_ylabel(facts["objective_title"])

    wide_rows = -(-len(fields) // min(_PANELS_A_ROW, len(fields)))
    return make_plot(
        "By field", "Other fields differ from point to point as well.",
        f"{facts['objective_title']} of {len(done)} trials against {', '.join(fields)}.", draw,
        (880, 250 * wide_rows), (350, 230 * len(fields)),
    )  # fmt: skip


def front(facts: Mapping[str, Any]) -> Plot | None:
    """Quality against size, with the Pareto front; None where only one of them counts, or no trial is finished."""
    done = [trial for trial in facts["trials"] if trial["state"] == "complete" and trial.get("size") is not None]
    if not facts["size_title"] or not done:
        return None
    best = sorted(((trial["size"], trial["value"]) for trial in done if trial["best"]), key=lambda point: point[0])

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        axes.scatter([t["size"] for t in done], [t["value"] for t in done], color=BEFORE, label="a trial")
        axes.plot(*zip(*best, strict=True), color=ACCENT, marker="o", zorder=3, label="Pareto front")
        style(axes)
        axes.set_xlabel(facts["size_title"])
        axes.set_ylabel(facts["objective_title"])
        axes.xaxis.set_major_formatter(count_formatter())
        axes.legend(frameon=False)

    both = f"{facts['objective_title']} and {facts['size_title']}"
    alt = f"{len(best)} of {len(done)} trials are on the Pareto front of {both}."
    return make_plot(
        "Quality against size", "On the front nothing is both smaller and better.", alt, draw, (880, 330), (350, 290)
    )


def _complete(facts: Mapping[str, Any]) -> Sequence[tuple[int, float]]:
    return [(trial["number"], trial["value"]) for trial in facts["trials"] if trial["state"] == "complete"]

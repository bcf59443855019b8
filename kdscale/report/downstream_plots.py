"""The plot of the section on tasks: accuracy of the kept checkpoints over training tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdscale.report.svg import AFTER, BEFORE, Plot, count_formatter, make_plot, style
from kdscale.runs.models import TEACHER, before_learning


def curve(facts: Mapping[str, Any]) -> Plot | None:
    """Mean accuracy over training tokens, from the student before it learnt; None without checkpoints."""
    downstream = facts["downstream"]
    points = downstream["curve"] if downstream else []
    if not points:
        return None
    means = downstream["means"]
    at, values = [point["tokens"] for point in points], [100 * point["value"] for point in points]
    errors = [100 * (point["error"] or 0.0) for point in points]
    if (before := before_learning(means)) is not None:
        at, values, errors = [0, *at], [100 * means[before], *values], [0.0, *errors]

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        axes.errorbar(at, values, yerr=errors, color=AFTER, linewidth=1.7, marker="o", markersize=4, capsize=2)
        if TEACHER in means:
            axes.axhline(100 * means[TEACHER], color=BEFORE, linewidth=1, linestyle="--")
            axes.text(1.0, 100 * means[TEACHER], "teacher ", color=BEFORE, ha="right", va="bottom",
                      transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_xlabel("training tokens")
        axes.set_ylabel("accuracy, %")
        axes.xaxis.set_major_formatter(count_formatter())
        style(axes)

    return make_plot(
        "Accuracy of the checkpoints",
        "Mean over the tasks, on the same items; bars are one standard error.",
        f"Line chart over training tokens: mean accuracy from {values[0]:.1f} % to {values[-1]:.1f} %.",
        draw,
        (880, 260),
        (350, 240),
    )

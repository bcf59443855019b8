"""Runs side by side: what `kdscale compare` finds in their folders, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import State

from kdscale.report.compare.runs import gather
from kdscale.report.tradeoff.points import COSTS, QUALITIES, from_json, with_both
from kdscale.runs.models import model_title
from kdscale.service.database.runs import Run
from kdscale.service.page.charts import Chart, Line, line_chart, smoothed
from kdscale.service.page.curves import Curves, curves_of_run
from kdscale.service.redaction import redacted

COLOURS = ("line-a", "line-b", "line-c", "line-d", "line-e", "line-f")
MOST_RUNS = len(COLOURS)


@dataclass(frozen=True)
class Comparison:
    """Facts as of `kdscale compare`, the runs that have them, charts, and class and label of each run in them."""

    facts: dict[str, Any]
    runs: list[Run]
    charts: list[Chart]
    legend: list[tuple[str, str]]
    notes: list[str]


def compare(state: State, runs: Sequence[Run]) -> Comparison | None:
    """Compare those of the runs that have a folder; None with fewer than one."""
    found = [run for run in runs if run.folder.is_dir()][:MOST_RUNS]
    notes = [f"{run.name} has no folder yet." for run in runs if run not in found]
    if not found:
        return None
    facts = redacted(gather([run.folder for run in found], _labels(found)))
    labels = [run["label"] for run in facts["runs"]]
    colours = dict(zip(labels, COLOURS, strict=False))
    notes += [f"{run['label']}: {damage}" for run in facts["runs"] for damage in run["damage"]]
    notes += [
        f"{item['run']} measured {item['figures']} otherwise than {item['first_run']}: not comparable (≠)."
        for item in facts["unlike"]
    ]
    charts = _curves([curves_of_run(state, run.folder) for run in found], labels) + _tradeoffs(facts, colours)
    return Comparison(facts, found, charts, [(css, label) for label, css in colours.items()], notes)


def _labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with the ends of their ids where two have one name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.name} ({run.id[-7:]})" for run in runs]


def _curves(curves: Sequence[Curves], labels: Sequence[str]) -> list[Chart]:
    """Loss, validation and speed, a line for each run; runs of which one has no tokens in its log are drawn apart."""
    x_titles = {each.x_title for each in curves if each.loss or each.validation}
    if len(x_titles) > 1:
        return []
    x_title = next(iter(x_titles), "step")
    measures = {each.validation_measure for each in curves if each.validation}

    def lines(points: Sequence[Sequence[tuple[float, float]]], dots: bool = False) -> list[Line]:
        rows = zip(labels, points, COLOURS, strict=False)
        return [Line(label, own, css, dots=dots) for label, own, css in rows]

    drawn = [line_chart("Training loss", lines([smoothed(each.loss) for each in curves]), x_title)]
    if len(measures) == 1:
        measure = measures.pop()
        validation = lines([each.validation for each in curves], dots=True)
        drawn.append(line_chart(f"Validation {measure}", validation, x_title, log=measure == "perplexity"))
    drawn.append(line_chart("Tokens a second", lines([smoothed(each.speed) for each in curves]), x_title))
    return [chart for chart in drawn if chart]


def _tradeoffs(facts: dict[str, Any], colours: dict[str, str]) -> list[Chart]:
    """A dot for each model: quality over size and over speed, where two models have both."""
    drawn = []
    for quality in QUALITIES:
        for cost in COSTS:
            points = with_both(from_json(facts["points"]), quality, cost)
            if len(points) < 2:
                continue
            dots = [
                Line(point.label, [(getattr(point, cost.key), getattr(point, quality.key))],
                     colours.get(point.run, "line-f"), dots=True, mark=model_title(point.name))
                for point in points
            ]  # fmt: skip
            drawn.append(line_chart(f"{quality.title} against {cost.title.lower()}", dots, cost.title.lower()))
    return [chart for chart in drawn if chart]

"""The facts of the section on bias, from bias.json: plain values and texts, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdscale.runs.bias_results import (
    FigureWords,
    Growth,
    MeasureResults,
    Part,
    Results,
    Value,
    grown_too_much,
    read_bias,
    results_of_run,
    unseen_limits,
    written,
)
from kdscale.runs.models import TEACHER, model_title

_MOST_GROUPS = 12  # of a measure, the largest


def bias(folder: Path, fail_if: Mapping[str, float] | None = None) -> dict[str, Any] | None:
    """What is shown of a run's folder `bias`; None where there is none. Raises RunFolderError for damage."""
    results = read_bias(folder)
    if results is None:
        return None
    limits = dict(fail_if or {})
    return {
        "settings": results.settings,
        "models": results.models,
        "results": results_of_run(results.models),
        "measures": [_measure(key, measure, results.models) for key, measure in results.measures.items()],
        "decisions": _decisions(results),
        "too_much": [str(one) for one in grown_too_much(results, limits)],
        "notes": [
            *(f"{measure.title}: {measure.note}" for measure in results.measures.values() if measure.note),
            *unseen_limits(results, limits),
        ],
        "grew": _grew(results),
    }


def _decisions(results: Results) -> list[tuple[str, str]]:
    """What a flip is, with the titles of the measures that share it."""
    titles: dict[str, list[str]] = {}
    for measure in results.measures.values():
        titles.setdefault(measure.decision, []).append(measure.title)
    return [(", ".join(own), decision) for decision, own in titles.items()]


def _grew(results: Results) -> list[str]:
    """Measures in which what the run hands on has grown: `CrowS-Pairs (distilled)`."""
    return [
        f"{measure.title} ({model_title(name).lower()})"
        for measure in results.measures.values()
        for name in results_of_run(results.models)
        if measure.verdict_of(name) == "grew"
    ]


def _measure(key: str, measure: MeasureResults, models: Sequence[str]) -> dict[str, Any]:
    head = measure.figures[measure.headline]
    shown = [name for name in measure.figures if measure.all.figures[TEACHER][name].value is not None]
    largest = sorted(measure.groups, key=lambda name: -measure.groups[name].items)[:_MOST_GROUPS]
    return {
        "key": key,
        "title": measure.title if key == measure.measure else f"{measure.title}: {key}",
        "paper": measure.paper,
        "decision": measure.decision,
        "items": measure.all.items,
        "clusters": measure.all.clusters,
        "figure": head.title,
        "ideal": head.ideal,
        "rows": [
            {
                "title": measure.figures[name].title + _ideal(measure.figures[name]),
                "headline": name == measure.headline,
                "cells": {model: _cell(measure.all.figures[model][name], measure.figures[name]) for model in models},
            }
            for name in shown
        ],
        "changes": [_change(measure.all, measure.headline, head, model) for model in models if model != TEACHER],
        "groups": [_group(name, measure.groups[name], measure.headline, head, models) for name in sorted(largest)],
        "left_out": len(measure.groups) - len(largest),
    }


def _ideal(figure: FigureWords) -> str:
    return "" if figure.ideal is None else f" (ideal {figure.ideal:g})"


def _group(name: str, part: Part, headline: str, figure: FigureWords, models: Sequence[str]) -> dict[str, Any]:
    return {
        "name": name,
        "items": part.items,
        "cells": {model: _cell(part.figures[model][headline], figure) for model in models},
        "changes": {model: _change(part, headline, figure, model) for model in models if model != TEACHER},
    }


def _cell(value: Value, figure: FigureWords) -> dict[str, Any]:
    return {
        "value": value.value,
        "error": value.error,
        "text": "–" if value.value is None else written(value.value, figure),
        "error_text": None if value.error is None or value.value is None else written(value.error, figure),
    }


def _change(part: Part, headline: str, figure: FigureWords, model: str) -> dict[str, Any]:
    change: Growth = part.changes[model].figures[headline]
    flips = part.changes[model].flips
    return {
        "model": model,
        "title": model_title(model),
        "change": None if change.change is None else written(change.change, figure, sign="+"),
        "change_error": None if change.error is None else written(change.error, figure),
        "growth": None if change.growth is None else written(change.growth, figure, sign="+"),
        "error_text": None if change.growth_error is None else written(change.growth_error, figure),
        "smallest": None if change.smallest is None else written(change.smallest, figure),
        "verdict": change.verdict or "not measurable",
        "to": flips["to"],
        "back": flips["back"],
    }

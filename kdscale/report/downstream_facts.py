"""The facts of the section on tasks, from downstream.json: plain values and texts, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdscale.errors import RunFolderError
from kdscale.files import read_json
from kdscale.runs.folder import DOWNSTREAM_FILE
from kdscale.runs.models import TEACHER, model_title

MEAN = "mean over tasks"
Cells = Mapping[str, Any]


def downstream(folder: Path) -> dict[str, Any] | None:
    """What the report shows of the scores on tasks; None where there are none. Raises RunFolderError for damage."""
    path = folder / DOWNSTREAM_FILE
    if not path.exists():
        return None
    result = read_json(path, RunFolderError, expect=dict)
    try:
        return _facts(result)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RunFolderError(f"{path} is damaged", got=repr(error), hint="kdscale run CONFIG makes it again") from error


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    tasks, models = result["tasks"], result["models"]
    rows = [_row(name, task, models) for name, task in tasks.items()]
    if len(tasks) > 1:
        cells = {name: _cell(model["mean"]) for name, model in models.items()}
        rows.append({"title": MEAN, "how": "every task counts alike", "cells": cells})
    return {
        "settings": dict(result.get("settings") or {}),
        "models": list(models),
        "rows": rows,
        "changes": [_change(pair, gap) for pair, gap in result["differences"].items()],
        "sample": in_part(tasks),
        "curve": _curve(result.get("curve")),
        "teacher": _percent(models[TEACHER]["mean"]["value"]) if TEACHER in models else None,
        "means": {name: model["mean"]["value"] for name, model in models.items()},
    }


def in_part(tasks: Mapping[str, Any]) -> str:
    """Which tasks were asked in part: `piqa 200 of 1,838 items`; empty when all were asked whole."""
    parts = [
        f"{name} {task['items']:,} of {task['available']:,}"
        for name, task in tasks.items()
        if task["items"] < task["available"]
    ]
    return f"items drawn by the seed: {', '.join(parts)}" if parts else ""


def _row(name: str, task: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
    shots = task["num_fewshot"]
    how = [f"{task['items']:,} items", f"{shots} example{'s' * (shots > 1)}" if shots else "no examples"]
    how += [f"chance {_percent(task['chance'])}"] if task["chance"] is not None else []
    cells = {model: _cell(figures["tasks"][name]) for model, figures in models.items()}
    return {"title": name, "how": f"{task['metric']} · {', '.join(how)}", "cells": cells}


def _cell(mean: Mapping[str, Any]) -> dict[str, Any]:
    error = mean["standard_error"]
    return {
        "value": float(mean["value"]),
        "text": _percent(mean["value"]),
        "error_text": None if error is None else f"{100 * error:.1f}",
    }


def _change(pair: str, gap: Mapping[str, Any]) -> dict[str, Any]:
    later, _, earlier = pair.partition("_minus_")
    rows = [_change_row(name, one) for name, one in gap["tasks"].items()]
    if len(rows) > 1:
        rows.append(_change_row(MEAN, gap["mean"]))
    return {"title": f"{model_title(later)} against {model_title(earlier).lower()}", "rows": rows}


def _change_row(name: str, gap: Mapping[str, Any]) -> dict[str, Any]:
    error = gap["standard_error"]
    return {
        "title": name,
        "change": points(gap["value"]),
        "error_text": None if error is None else f"{100 * error:.1f}",
        "interval": f"{points(gap['low'])} to {points(gap['high'])}",
        "certain": gap["low"] > 0 or gap["high"] < 0,
        "rose": int(gap["rose"]),
        "fell": int(gap["fell"]),
        "p": None if gap["p"] is None else "< 0.001" if gap["p"] < 0.001 else f"{gap['p']:.3f}",
    }


def _curve(curve: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    return [
        {
            "step": point["step"], "tokens": point["tokens"], "value": float(point["mean"]["value"]),
            "error": point["mean"]["standard_error"],
        }
        for point in curve or []
    ]  # fmt: skip


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign: `−3.1`."""
    return f"{100 * value:+.1f}".replace("-", "−")

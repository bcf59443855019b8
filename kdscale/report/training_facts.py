"""The facts of the distillation section, from the training log: plain values, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdscale.config.distill.objectives import OBJECTIVES

_MOST_POINTS = 240  # of a term's curve; more steps are averaged in groups
_NOT_TERMS = {"kind", "step", "tokens", "labels", "loss"}
Row = Mapping[str, Any]


def curves(rows: Sequence[Row]) -> dict[str, Any]:
    """Loss and perplexity by step, of training and of validation, and each term of the loss.

    Values that are no finite numbers (a skipped step) are left out.
    """
    train, validation = ([row for row in rows if row["kind"] == kind] for kind in ("train", "validation"))
    out: dict[str, Any] = {
        name: [
            {key: row[key] for key in ("step", "tokens", "loss", "perplexity") if _finite(row.get(key))} for row in kept
        ]
        for name, kept in (("train", train), ("validation", validation))
    }
    # A validation row counts the tokens it was measured on; on the chart it stands at the tokens trained on by then.
    tokens_per_step = _tokens_per_step(out["train"])
    for point in out["validation"]:
        if tokens_per_step is None:
            point.pop("tokens", None)
        else:
            point["tokens"] = round(point["step"] * tokens_per_step)
    speeds = sorted(row["tokens_per_second"] for row in train if "tokens_per_second" in row)
    out["tokens_per_second"] = speeds[len(speeds) // 2] if speeds else None
    out["skipped_steps"] = sum(row.get("skipped", 0) for row in train)
    out["terms"] = _terms(train, validation)
    return out


def _tokens_per_step(points: Sequence[Row]) -> float | None:
    counted = [point for point in points if point["step"] and "tokens" in point]
    return counted[-1]["tokens"] / counted[-1]["step"] if counted else None


def _terms(train: Sequence[Row], validation: Sequence[Row]) -> list[dict[str, Any]]:
    """What the objectives log beside the loss: the columns of a validation that training logs too."""
    logged = {name for row in train for name in row}
    known = {term.name: term for objective in OBJECTIVES.values() for term in objective.terms}
    return [
        {
            "name": name,
            "title": known[name].title if name in known else name.replace("_", " "),
            "unit": known[name].unit if name in known else "",
            "train": _thinned(_points(train, name)),
            "validation": _points(validation, name),
        }
        for name in dict.fromkeys(name for row in validation for name in row)
        if name in logged - _NOT_TERMS
    ]


def _points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if _finite(row.get(name))]


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `_MOST_POINTS`: means of runs of neighbours, each at its last step."""
    if len(points) <= _MOST_POINTS:
        return points
    groups = np.array_split(np.asarray(points, dtype=np.float64), _MOST_POINTS)
    return [(int(group[-1, 0]), float(group[:, 1].mean())) for group in groups]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

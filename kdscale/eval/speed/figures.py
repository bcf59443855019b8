"""From the seconds that a model took to its figures. Definitions: docs/reference/figures.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kdscale.config.evaluation.speed import SpeedConfig

_FEWEST_FOR_P95 = 5


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, 95th percentile and number of measurements.

    The percentile is the smallest value that is at least as large as 95 % of them; of fewer than 20 that is the
    largest, and of fewer than 5 it would say nothing and is None.
    """
    ordered = sorted(values)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1] if len(ordered) >= _FEWEST_FOR_P95 else None
    return {"median": statistics.median(ordered), "p95": p95, "measurements": len(ordered)}


def cell_figures(
    batch: int, context: int, answers: Sequence[Mapping[str, Any]], left_out: str | None
) -> dict[str, Any]:
    """One batch size with one context length, from each generation's seconds; without any, `left_out` says why."""
    cell: dict[str, Any] = {"batch": batch, "context": context, "repeats": len(answers), "left_out": left_out}
    if not answers:
        return cell
    decode = [batch * len(answer["gaps"]) / sum(answer["gaps"]) for answer in answers]
    prefill = [batch * context / answer["first_token"] for answer in answers]
    joules = [answer["joules"] for answer in answers]
    tokens = batch * sum(len(answer["gaps"]) for answer in answers)
    return cell | {
        "first_token_seconds": spread([answer["first_token"] for answer in answers]),
        "token_seconds": spread([gap for answer in answers for gap in answer["gaps"]]),
        "prefill_tokens_per_second": statistics.median(prefill),
        "prefill_tokens_per_second_range": [min(prefill), max(prefill)],
        "decode_tokens_per_second": statistics.median(decode),
        "decode_tokens_per_second_range": [min(decode), max(decode)],
        "joules_per_token": None if None in joules else sum(joules) / tokens,
    }


_HEADLINE = (
    "prefill_tokens_per_second", "prefill_tokens_per_second_range", "decode_tokens_per_second",
    "decode_tokens_per_second_range", "joules_per_token", "repeats",
)  # fmt: skip


def model_figures(
    cells: Sequence[Mapping[str, Any]],
    growth: Sequence[Mapping[str, Any]],
    growth_ended: str | None,
    growth_context: int,
    cfg: SpeedConfig,
) -> dict[str, Any]:
    """All figures of one model; those of its smallest batch and context stand at the top."""
    first = cells[0]
    best = max(growth, key=lambda step: step["tokens_per_second"], default=None)
    return {
        **{key: first[key] for key in _HEADLINE},
        "first_token_seconds": first["first_token_seconds"]["median"],
        "token_seconds": first["token_seconds"]["median"],
        "token_seconds_p95": first["token_seconds"]["p95"],
        "batch": first["batch"],
        "context": first["context"],
        "new_tokens": cfg.new_tokens,
        "saturated_tokens_per_second": best and best["tokens_per_second"],
        "saturation": best and {**best, "context": growth_context, "ended_by": growth_ended, "steps": list(growth)},
        "cells": list(cells),
    }

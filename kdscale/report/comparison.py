"""The side-by-side table, and how figures are written. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.units import decimals, format_count, format_number, format_size

MODELS = ("teacher", "pruned", "distilled")


_TIMING_NOISE = 0.03  # speeds nearer to each other than this are called alike


@dataclass(frozen=True)
class Figure:
    """One row: where its value lies in eval.json, how it is written, and which direction is good."""

    group: str
    section: str
    key: str
    title: str
    form: str
    better: str | None  # "lower", "higher"; None: not a matter of better or worse
    error: str | None = None
    ratio: bool = True


FIGURES = (
    Figure("Quality", "quality", "perplexity", "Perplexity", "significant", "lower", "perplexity_standard_error"),
    Figure("Quality", "quality", "bits_per_byte", "Bits per byte", "fixed3", "lower"),
    Figure("Quality", "quality", "ce", "Cross-entropy, nats a token", "fixed3", "lower", "ce_standard_error"),
    Figure("Quality", "quality", "kl_to_teacher", "KL to the teacher, nats a token", "fixed3", "lower",
           "kl_to_teacher_standard_error", ratio=False),
    Figure("Quality", "quality", "top1_agreement", "Top-1 agreement with the teacher", "percent", "higher",
           "top1_agreement_standard_error", ratio=False),
    Figure("Quality", "quality", "top1_accuracy", "Top-1 accuracy", "percent", "higher"),
    Figure("Quality", "quality", "expected_calibration_error", "Expected calibration error", "percent", "lower"),
    Figure("Size", "size", "parameters", "Parameters", "count", "lower"),
    Figure("Size", "size", "non_embedding_parameters", "Non-embedding parameters", "count", "lower"),
    Figure("Size", "size", "weight_bytes", "Weights on disk", "size", "lower"),
    Figure("Size", "size", "kv_cache_bytes_per_token", "KV cache a token, 16-bit", "size", "lower"),
    Figure("Speed and memory", "efficiency", "prefill_tokens_per_second", "Prefill, tokens/s", "significant", "higher"),
    Figure("Speed and memory", "efficiency", "decode_tokens_per_second", "Decode, tokens/s", "significant", "higher"),
    Figure("Speed and memory", "efficiency", "peak_memory_bytes", "Peak memory", "size", "lower"),
)  # fmt: skip


def comparison(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with value, standard error, ratio to the teacher and written form a model; `best` names the best models."""
    rows = []
    for figure in FIGURES:
        cells: dict[str, Any] = {}
        for name in MODELS:
            section = evaluation["models"].get(name, {}).get(figure.section, {})
            if (value := section.get(figure.key)) is None:
                continue
            error = section.get(figure.error) if figure.error else None
            cells[name] = {
                "value": value,
                "text": written(value, figure.form),
                "error": error,
                "error_text": None if error is None else written_error(error, value, figure.form),
            }
        if not cells:
            continue
        teacher = cells.get("teacher", {}).get("value")
        for cell in cells.values():
            cell["ratio"] = cell["value"] / teacher if figure.ratio and teacher else None
        rows.append(
            {
                "group": figure.group,
                "key": figure.key,
                "title": figure.title,
                "better": figure.better,
                "cells": cells,
                "best": _best(cells, figure.better, _TIMING_NOISE if figure.section == "efficiency" else 0.0),
            }
        )
    return rows


def _best(cells: Mapping[str, Any], better: str | None, alike: float) -> list[str]:
    """Models whose value is the best, as written or within `alike` of it; none where that is true of all."""
    if better is None or len(cells) < 2:
        return []
    values = {name: cell["value"] for name, cell in cells.items()}
    top = min(values.values()) if better == "lower" else max(values.values())
    wanted = next(cells[name]["text"] for name, value in values.items() if value == top)
    names = [name for name in cells if cells[name]["text"] == wanted or abs(values[name] - top) <= alike * abs(top)]
    return names if len(names) < len(cells) else []


def written(value: float, form: str) -> str:
    if form == "fixed3":
        return f"{value:.3f}"
    if form == "percent":
        return f"{100 * value:.1f} %"
    return {"count": format_count, "size": format_size, "significant": lambda v: format_number(float(v))}[form](value)


def written_error(error: float, value: float, form: str) -> str:
    if form == "percent":
        return f"{100 * error:.1f}"
    if form == "fixed3":
        return f"{error:.3f}"
    return f"{error:.{decimals(value)}f}"

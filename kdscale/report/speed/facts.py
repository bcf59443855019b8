"""What eval.json says of speed, as the rows of the report's tables: plain values, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdscale.runs.models import model_title
from kdscale.units import format_number

_ENDED_BY = {  # why no larger batch was tried, where it might have given more
    "gain": "",
    "memory": "; memory held no more",
    "max_batch_size": "; eval.speed.max_batch_size",
    "seconds": "; then the time ended",
}


def speed(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Groups of rows, a row for each batch size and context length, with a cell a model; None where none was measured.

    `left_out`: what was not measured, and why.
    """
    models = {
        name: figures
        for name, model in evaluation["models"].items()
        if (figures := model.get("efficiency") or {}).get("cells")
    }
    reasons = {
        name: reason for name, model in evaluation["models"].items() if (reason := model.get("efficiency_left_out"))
    }
    if not models:
        return None
    first = next(iter(models.values()))
    groups = [
        {"title": title, "rows": [row for cell in first["cells"] if (row := _row(models, cell, value))["cells"]]}
        for title, value in _GROUPS.items()
    ]
    missing: dict[str, list[str]] = {}
    for name, figures in models.items():
        for cell in figures["cells"]:
            if cell["left_out"]:
                missing.setdefault(cell["left_out"], []).append(
                    f"{_sizes(cell['batch'], cell['context'])} ({model_title(name).lower()})"
                )
    return {
        "new_tokens": first["new_tokens"],
        "dtype": first["dtype"],
        "device": first["device"],
        "repeats": sorted({cell["repeats"] for figures in models.values() for cell in figures["cells"]} - {0}),
        "cuda_graphs": all(figures["cuda_graphs"] for figures in models.values()),
        "cuda_graphs_refused": {
            model_title(name): figures["cuda_graphs_refused"]
            for name, figures in models.items()
            if figures["cuda_graphs_refused"]
        },
        "groups": [*(group for group in groups if group["rows"]), *_saturation(models)],
        "left_out": _left_out(missing, len(models)),
        "models_left_out": {model_title(name): reason for name, reason in reasons.items()},
    }


def milliseconds(seconds: float) -> str:
    """A short time as people read it: `23.4 ms`, `1.25 s`."""
    return f"{format_number(float(seconds))} s" if seconds >= 1 else f"{format_number(1000 * float(seconds))} ms"


def _times(cell: Mapping[str, Any], key: str) -> tuple[float, str, str] | None:
    times = cell.get(key)
    if times is None:
        return None
    under = "" if times["p95"] is None else f"p95 {milliseconds(times['p95'])}"
    return times["median"], milliseconds(times["median"]), under


def _rate(cell: Mapping[str, Any]) -> tuple[float, str, str] | None:
    value = cell.get("decode_tokens_per_second")
    return None if value is None else (value, format_number(float(value)), "")


def _joules(cell: Mapping[str, Any]) -> tuple[float, str, str] | None:
    value = cell.get("joules_per_token")
    return None if value is None else (value, f"{format_number(float(value))} J", "")


# Title of a group of rows, and value, text and what stands under it, of a cell of eval.json.
_GROUPS: dict[str, Callable[[Mapping[str, Any]], tuple[float, str, str] | None]] = {
    "Time to first token": lambda cell: _times(cell, "first_token_seconds"),
    "Time between tokens": lambda cell: _times(cell, "token_seconds"),
    "Tokens per second, of all sequences": _rate,
    "Energy per token": _joules,
}


def _row(
    models: Mapping[str, Any],
    like: Mapping[str, Any],
    value: Callable[[Mapping[str, Any]], tuple[float, str, str] | None],
) -> dict[str, Any]:
    cells = {}
    for name, figures in models.items():
        for cell in figures["cells"]:
            if (cell["batch"], cell["context"]) == (like["batch"], like["context"]) and (found := value(cell)):
                cells[name] = dict(zip(("value", "text", "under"), found, strict=True))
    return {
        "batch": like["batch"],
        "context": like["context"],
        "title": _sizes(like["batch"], like["context"]),
        "cells": cells,
    }


def _sizes(batch: int, context: int) -> str:
    return f"{batch:,} × {context:,} tokens"


def _saturation(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The highest throughput of each model, where it was looked for."""
    found = {name: figures["saturation"] for name, figures in models.items() if figures["saturation"]}
    if not found:
        return []
    cells = {
        name: {
            "value": best["tokens_per_second"],
            "text": format_number(float(best["tokens_per_second"])),
            "under": f"{best['batch']:,} at once{_ENDED_BY.get(best['ended_by'], '')}",
        }
        for name, best in found.items()
    }
    context = next(iter(found.values()))["context"]
    row = {"batch": None, "context": context, "title": f"after {context:,} tokens", "cells": cells}
    return [{"title": "Most tokens per second", "rows": [row]}]


def _left_out(missing: Mapping[str, list[str]], models: int) -> list[str]:
    """One sentence for each reason; sizes that no model was measured with are named once."""
    sentences = []
    for reason, named in missing.items():
        sizes = [entry.partition(" (")[0] for entry in named]
        shared = [size for size in dict.fromkeys(sizes) if sizes.count(size) == models]
        single = [entry for entry, size in zip(named, sizes, strict=True) if size not in shared]
        sentences.append(f"Not measured, as {reason}: {', '.join([*shared, *single])}.")
    return sentences

"""The side-by-side table of whatever models were evaluated, and how its figures are written. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.runs.metrics_log import is_figure
from kdscale.runs.models import CORRECTED, TEACHER, is_quantized
from kdscale.units import decimals, format_count, format_number, format_size

NOISE = 2.0  # standard errors that a difference must exceed to be called one
_LOSS, _FROM_LOSS = "ce", ("ce", "perplexity", "bits_per_byte")  # all of these fall and rise together
_TIMED = ("efficiency", "draft")
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
    Figure("Quality", "quality", "perplexity", "Perplexity", "number", "lower", "perplexity_standard_error"),
    Figure("Quality", "quality", "bits_per_byte", "Bits per byte", "fixed3", "lower"),
    Figure("Quality", "quality", "ce", "Cross-entropy, nats per token", "fixed3", "lower", "ce_standard_error"),
    Figure("Quality", "quality", "kl_to_teacher", "KL to the teacher, nats per token", "fixed3", "lower",
           "kl_to_teacher_standard_error", ratio=False),
    Figure("Quality", "quality", "top1_agreement", "Top-1 agreement with the teacher", "percent", "higher",
           "top1_agreement_standard_error", ratio=False),
    Figure("Quality", "quality", "acceptance", "Accepted as a draft, temperature 1", "percent", "higher",
           "acceptance_standard_error", ratio=False),
    Figure("Quality", "quality", "top1_accuracy", "Top-1 accuracy", "percent", "higher"),
    Figure("Quality", "quality", "similarity_kept", "Similarity kept, Spearman", "fixed3", "higher",
           "similarity_kept_standard_error", ratio=False),
    Figure("Quality", "quality", "class_accuracy", "Accuracy of classes", "percent", "higher",
           "class_accuracy_standard_error"),
    Figure("Quality", "quality", "class_agreement", "Class as the teacher's", "percent", "higher",
           "class_agreement_standard_error", ratio=False),
    Figure("Quality", "quality", "class_kl", "KL to the teacher's classes, nats", "fixed3", "lower",
           "class_kl_standard_error", ratio=False),
    Figure("Quality", "quality", "neighbour_kept", "Nearest neighbour kept", "percent", "higher", ratio=False),
    Figure("Quality", "quality", "embedding_cosine", "Cosine to the teacher's embedding", "fixed3", "higher",
           ratio=False),
    Figure("Quality", "quality", "expected_calibration_error", "Expected calibration error", "percent", "lower"),
    Figure("Size", "size", "parameters", "Parameters", "count", "lower"),
    Figure("Size", "size", "non_embedding_parameters", "Non-embedding parameters", "count", "lower"),
    Figure("Size", "size", "weight_bytes", "Weights on disk", "size", "lower"),
    Figure("Size", "size", "kv_cache_bytes_per_token", "KV cache per token, 16-bit", "size", "lower"),
    Figure("Speed and memory", "efficiency", "prefill_tokens_per_second", "Prefill, tokens/s", "number", "higher"),
    Figure("Speed and memory", "efficiency", "decode_tokens_per_second", "Decode, tokens/s", "number", "higher"),
    Figure("Speed and memory", "efficiency", "saturated_tokens_per_second", "Most tokens/s, any batch",
           "number", "higher"),
    Figure("Speed and memory", "efficiency", "joules_per_token", "Energy per token, J", "number", "lower"),
    Figure("Speed and memory", "efficiency", "peak_memory_bytes", "Peak memory", "size", "lower"),
    Figure("As a draft of the teacher", "draft", "tokens_per_call", "Tokens for each call of the teacher", "fixed3",
           "higher", ratio=False),
    Figure("As a draft of the teacher", "draft", "draft_cost", "Cost of a token, in the teacher’s", "fixed3", "lower",
           ratio=False),
    Figure("As a draft of the teacher", "draft", "speed_up", "Expected speed-up", "fixed3", "higher", ratio=False),
)  # fmt: skip


_ALWAYS = ("perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement")  # every evaluation has these, or null


def is_evaluation(value: Any) -> bool:
    """Whether a JSON value holds what is shown of eval.json: for each model a number, or null, for every measure."""
    models = value.get("models") if isinstance(value, dict) else None
    if not isinstance(models, dict) or not models:
        return False
    differences = value.get("differences", {})
    pairs = list(differences.values()) if isinstance(differences, dict) else [None]
    if not all(isinstance(pair, dict) and all(v is None or is_figure(v) for v in pair.values()) for pair in pairs):
        return False
    return all(_is_model(model) for model in models.values())


def _is_model(model: Any) -> bool:
    quality = model.get("quality") if isinstance(model, dict) else None
    if not isinstance(quality, dict) or not all(key in quality for key in _ALWAYS):
        return False
    return all(
        isinstance(section := model.get(figure.section, {}), dict)
        and all(section.get(key) is None or is_figure(section[key]) for key in (figure.key, figure.error) if key)
        for figure in FIGURES
    )


def students(evaluation: Mapping[str, Any]) -> list[str]:
    """The evaluated models that are no teacher, in the order of the evaluation; the last is the run's result.

    Its quantised forms are none: they are the same student in fewer bits.
    """
    return [name for name in evaluation["models"] if name not in (TEACHER, CORRECTED) and not is_quantized(name)]


def comparison(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: value, standard error, ratio to the teacher and text for each model, and the best models.

    A model without the figure has no cell; a ratio is None where there is no teacher to compare with.
    """
    rows = []
    of_quality = [figure for figure in FIGURES if figure.section == "quality"]
    others = [figure for figure in FIGURES if figure.section != "quality"]
    for figure in (*of_quality, *_of_sources(evaluation), *others):
        cells: dict[str, Any] = {}
        for name, model in evaluation["models"].items():
            section = model.get(figure.section, {})
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
        teacher = cells.get(TEACHER, {}).get("value")
        for cell in cells.values():
            cell["ratio"] = cell["value"] / teacher if figure.ratio and teacher else None
        rows.append(
            {
                "group": figure.group,
                "key": figure.key,
                "title": figure.title,
                "better": figure.better,
                "cells": cells,
                "best": _best(cells, figure.better, _TIMING_NOISE if figure.section in _TIMED else 0.0),
            }
        )
    return rows


def _of_sources(evaluation: Mapping[str, Any]) -> list[Figure]:
    """A figure for each source of the text whose perplexity was measured."""
    names = dict.fromkeys(name for model in evaluation["models"].values() for name in model.get("by_source", {}))
    return [Figure("Perplexity by source", "by_source", name, name, "number", "lower") for name in names]


def worsened(evaluation: Mapping[str, Any]) -> list[str]:
    """Every quality measure that is worse in the run's last student than in its first, the pruned one.

    Each reads `KL to the teacher 1.310 → 1.590`. Values that are written alike count as equal, and so do those within
    `NOISE` standard errors of each other.
    """
    names = students(evaluation)
    if len(names) < 2:
        return []
    first, last = (evaluation["models"][name].get("quality", {}) for name in (names[0], names[-1]))
    paired = evaluation.get("differences", {}).get(f"{names[-1]}_minus_{names[0]}", {})
    out = []
    for figure in FIGURES:
        before, after = first.get(figure.key), last.get(figure.key)
        if figure.section != "quality" or before is None or after is None:
            continue
        texts = written(before, figure.form), written(after, figure.form)
        worse = (after > before) == (figure.better == "lower")
        if worse and texts[0] != texts[1] and not _is_noise(figure, before, after, paired):
            out.append(f"{figure.title.partition(',')[0]} {texts[0]} → {texts[1]}")
    return out


def _is_noise(figure: Figure, before: float, after: float, paired: Mapping[str, Any]) -> bool:
    """Whether a difference is within NOISE standard errors of it; False where its standard error is not known."""
    key = _LOSS if figure.key in _FROM_LOSS else figure.key
    error = paired.get(f"{key}_standard_error")
    gap = paired.get(key)
    return error is not None and abs(after - before if gap is None else gap) <= NOISE * error


def _best(cells: Mapping[str, Any], better: str | None, alike: float) -> list[str]:
    """Models whose value is the best, as written or within `alike` of it; none where that is true of all."""
    if better is None or len(cells) < 2:
        return []
    values = {name: cell["value"] for name, cell in cells.items()}
    top = min(values.values()) if better == "lower" else max(values.values())
    best_text = next(cells[name]["text"] for name, value in values.items() if value == top)
    names = [name for name in cells if cells[name]["text"] == best_text or abs(values[name] - top) <= alike * abs(top)]
    return names if len(names) < len(cells) else []


def written(value: float, form: str) -> str:
    """A figure as a person reads it; `form` is number, fixed3, percent, count or size."""
    if form == "fixed3":
        return f"{value:.3f}"
    if form == "percent":
        return f"{100 * value:.1f} %"
    if form == "number":
        return format_number(float(value))
    return format_count(value) if form == "count" else format_size(value)


def written_error(error: float, value: float, form: str) -> str:
    """A standard error with as many decimals as its value is written with."""
    if form == "percent":
        return f"{100 * error:.1f}"
    return f"{error:.{3 if form == 'fixed3' else decimals(value)}f}"

"""What was found of a model, in rows for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kdscale.units import format_count, format_size

_AXIS_TITLES = {"kv_heads": "kv heads", "heads": "query heads"}


def summary_rows(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What the model is: a title and what it says, a row each."""
    if facts["kind"] == "adapter":
        of = facts["adapter"]
        yield "adapter", f"{of['type']} of {of['of']}"
        if "rank" in of:
            yield "rank", f"{of['rank']}, {of['modules']} modules, {of['replaced']} tensors replaced"
        return
    nested = facts.get("nested")
    inside = f", the language model ({nested['language_model']}) of {nested['model']}" if nested else ""
    yield "family", f"{facts.get('family', 'unknown')}{inside}"
    yield "model type", str(facts.get("model_type") or facts.get("architecture"))
    if sizes := facts.get("sizes"):
        yield "sizes", ", ".join(f"{axis} {size:,}" for axis, size in sizes.items() if size)
    if count := facts.get("parameters"):
        known = [f"{format_count(count['non_embedding'], 4)} without embeddings"]
        if count.get("active", count["total"]) != count["total"]:
            known.append(f"{format_count(count['active'], 4)} for each token")
        yield "parameters", f"{format_count(count['total'], 4)} ({', '.join(known)})"
    if weights := facts.get("weights"):
        kinds = ", ".join(f"{format_count(count)} {name}" for name, count in weights["dtypes"].items())
        yield "weights", f"{format_size(weights['bytes'])} in {weights['files']} files: {kinds}"
    yield "quantised", str(facts.get("quantization") or "no")
    if "tied" in facts:
        yield "output head", "tied to the embedding" if facts["tied"] else "a matrix of its own"
    if facts.get("context"):
        yield "context", f"{facts['context']:,} tokens" if isinstance(facts["context"], int) else str(facts["context"])
    for part in facts.get("parts", ()):
        yield f"part: {part['what']}", f"{part['tensors']:,} tensors, {format_count(part['parameters'], 4)} values"


def axis_rows(axes: dict[str, dict[str, Any]]) -> Iterable[tuple[str, str, str]]:
    """Each axis, its size, and whether it can be cut."""
    for axis, fact in axes.items():
        if fact["cuttable"]:
            others = " and ".join(_AXIS_TITLES.get(other, other) for other in fact["together_with"])
            text = f"yes, together with {others}" if others else "yes"
        else:
            text = f"no: {fact['why']}"
        yield _AXIS_TITLES.get(axis, axis), f"{fact['size']:,}", text


def cut_rows(cuts: list[dict[str, Any]]) -> Iterable[tuple[str, str, str, str]]:
    """Each typical student: what is cut, the sizes, parameters and bytes."""
    for cut in cuts:
        sizes = ", ".join(f"{_AXIS_TITLES.get(axis, axis)} {size:,}" for axis, size in cut["sizes"].items())
        yield cut["cut"], sizes, format_count(cut["parameters"], 4), format_size(cut["bf16_bytes"])

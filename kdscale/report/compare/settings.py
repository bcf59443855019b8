"""With what settings figures were measured, and in which fields configs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_QUALITY = ("split", "tokens", "bytes", "document_pieces", "seq_len", "dtype")
_SPEED = ("device_name", "threads")
_OF_CELL = ("batch", "context", "new_tokens", "dtype", "device", "cuda_graphs", "interleaved")
_ANSWERS = ("dtype", "lm_eval")
_NO_DIFFERENCE = ("name", "run_dir")  # every run has its own


def measured_with(
    evaluation: Mapping[str, Any] | None,
    tasks: Mapping[str, Any] | None,
    bias: Mapping[str, Any] | None,
    heldout: Mapping[str, str] | None,
) -> dict[str, dict[str, Any] | None]:
    """Settings by kind of figure; None for a kind that was not measured. Figures of equal settings can be compared."""
    made = evaluation.get("settings") if evaluation else None
    made = made if isinstance(made, dict) else {}
    quality = None
    if evaluation:
        quality = {name: made.get(name) for name in _QUALITY}
        quality["held-out text"] = "; ".join(f"{digest[:12]}" for _, digest in sorted((heldout or {}).items())) or None
    models: Mapping[str, Any] = evaluation["models"] if evaluation else {}
    first = next((speed for model in models.values() if (speed := model.get("efficiency"))), None)
    speed = None
    if first:
        speed = {name: made.get(name) for name in _SPEED} | {name: first.get(name) for name in _OF_CELL}
    of_tasks = of_bias = of_drafts = None
    if quality and (draft := next((draft for model in models.values() if (draft := model.get("draft"))), None)):
        # the best of the draft lengths is shown
        machine = {name: made.get(name) for name in _SPEED}
        of_drafts = quality | machine | {"draft_lengths": draft.get("draft_lengths")}
    if tasks:
        of_tasks = {row["title"]: row["how"] for row in tasks["rows"]} | _asked_with(tasks, bool(tasks["sample"]))
    if bias:
        of_bias = {measure["title"]: f"{measure['items']:,} items" for measure in bias["measures"]}
        of_bias |= _asked_with(bias, bias["settings"].get("limit") is not None)
    return {"quality": quality, "speed": speed, "drafts": of_drafts, "tasks": of_tasks, "bias": of_bias}


def _asked_with(facts: Mapping[str, Any], drawn: bool) -> dict[str, Any]:
    """What else answers depend on; the seed, where it has drawn the items."""
    names = (*_ANSWERS, *(["seed"] if drawn else []))
    return {name: facts["settings"].get(name) for name in names}


def differing_fields(configs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fields that not all configs agree on, with the value that each has; a field that one lacks is None there."""
    flat = {run: dict(dotted_fields(config)) for run, config in configs.items()}
    names = sorted({name for fields in flat.values() for name in fields} - set(_NO_DIFFERENCE))
    return [
        {"field": name, "values": {run: fields.get(name) for run, fields in flat.items()}}
        for name in names
        if len({repr(fields.get(name)) for fields in flat.values()}) > 1
    ]


def dotted_fields(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config with its dotted name; entries of a list of mappings by their number."""
    if isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        for key, inner in tree.items():
            yield from dotted_fields(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, tree

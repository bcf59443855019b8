"""The facts of the distillation section: from the training log, and from what the student wrote (RUN/on-policy).

Plain values, no torch.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdscale.config.distill.objective import LOSS
from kdscale.config.distill.objectives import OBJECTIVES, OWN_TEXT, of_own_text
from kdscale.escaping import for_terminal
from kdscale.units import format_count

_MOST_POINTS = 240  # of a term's curve; more steps are averaged in groups
_NOT_TERMS = {"kind", "step", "tokens", "labels", "loss"}
_MOST_BYTES = 32 << 20  # of each file of texts that are read: of a longer one its beginning and its end
_MOST_LINE = 4 << 20
_ROUNDS_SHOWN, _SAMPLES_SHOWN, _CHARACTERS = 12, 3, 600
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
    terms = [term for objective in OBJECTIVES.values() for term in objective.terms]
    own = [of_own_text(term, section) for section in OWN_TEXT for term in (LOSS, *terms)]
    known = {term.name: term for term in [*terms, *own]}
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


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    weights_of_step: int = Field(ge=0, le=2**53)
    sequence: int = Field(ge=0, le=2**53)
    slot: int = Field(ge=0, le=2**31)
    prompt: str
    text: str
    ended: bool
    prompt_tokens: int = Field(ge=0, le=2**31)
    answer_tokens: int = Field(ge=1, le=2**31)
    mean_entropy: float | None = None


def written(folder: Path) -> dict[str, Any] | None:
    """What the report shows of the texts; None where there are none. Lines that are no records are passed over."""
    rounds: dict[int, list[_Record]] = defaultdict(list)
    cut = False
    for file in sorted(folder.glob("rank-*.jsonl")):
        if file.is_symlink() or not file.is_file():
            continue
        cut |= file.stat().st_size > _MOST_BYTES
        for line in _lines(file):
            try:
                record = _Record.model_validate(json.loads(line))
            except (ValidationError, ValueError, RecursionError):
                continue
            rounds[record.weights_of_step].append(record)
    if not rounds:
        return None
    steps = sorted(rounds)
    shown = {steps[i * len(steps) // _ROUNDS_SHOWN] for i in range(_ROUNDS_SHOWN)} | {steps[-1]}
    everything = [record for step in steps for record in rounds[step]]
    return {
        "texts": len(everything),
        "tokens": format_count(sum(record.answer_tokens for record in everything)),
        "rounds": len(steps),
        "in_part": cut,
        "by_round": [_of_round(step, rounds[step]) for step in sorted(shown)],
        "samples": [
            _sample(record)
            for step in dict.fromkeys((steps[0], steps[-1]))
            for record in sorted(rounds[step], key=lambda record: (record.sequence, record.slot))[:_SAMPLES_SHOWN]
        ],
    }


def _of_round(step: int, records: list[_Record]) -> dict[str, Any]:
    lengths = sorted(record.answer_tokens for record in records)
    entropies = [record.mean_entropy for record in records if record.mean_entropy is not None]
    return {
        "step": step,
        "texts": len(records),
        "median_tokens": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "ended": sum(record.ended for record in records) / len(records),
        "entropy": sum(entropies) / len(entropies) if entropies else None,
    }


def _sample(record: _Record) -> dict[str, Any]:
    return {
        "step": record.weights_of_step, "prompt": _shown(record.prompt, end=True), "text": _shown(record.text),
        "ended": record.ended,
    }  # fmt: skip


def _shown(text: str, end: bool = False) -> str:
    """At most so many characters of a text, its end or its beginning, with control characters written out."""
    if len(text) > _CHARACTERS:
        text = "…" + text[-_CHARACTERS:] if end else text[:_CHARACTERS] + "…"
    return for_terminal(text)


def _lines(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        for begin in (0, size - _MOST_BYTES // 2) if size > _MOST_BYTES else (0,):
            end = begin + _MOST_BYTES // 2 if size > _MOST_BYTES else size
            stream.seek(begin)
            if begin:
                stream.readline(_MOST_LINE)  # the rest of a line
            while stream.tell() < end and (line := stream.readline(_MOST_LINE)):
                yield line

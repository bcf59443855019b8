"""What eval.json says of students as drafts of the teacher, as rows of the report's table: plain values, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdscale.report.speed.facts import milliseconds
from kdscale.runs.models import TEACHER, model_title

_WAYS = {"sampled": "temperature 1", "greedy": "greedy"}
Cell = tuple[float, str, str]  # value, its text, what stands under it


def drafts(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Groups of rows with a cell a model, as those of speed; None where no model was measured as a draft.

    `models`: the names of those that were; `left_out`: titles of models that did not generate, and why.
    """
    models = {name: model for name, model in evaluation["models"].items() if model.get("draft")}
    if not models:
        return None
    measured = {name: model["draft"] for name, model in models.items()}
    first = next(iter(measured.values()))
    lengths = first["draft_lengths"]
    groups = [_group("Accepted tokens, on held-out text", _accepted(models))]
    for way, title in _WAYS.items():
        groups += [
            _group(f"{what}, {title}", [_row(_tokens(length), measured, _of_length(way, length, read))
                                        for length in lengths])
            for what, read in (("Tokens for each call of the teacher", _calls), ("Expected speed-up", _speed_up))
        ]  # fmt: skip
    generated = {name: draft["generated"] for name, draft in measured.items() if draft["generated"]}
    if generated:
        length = next(iter(generated.values()))["length"]
        rows = [_row(title, generated, _really(way)) for way, title in _WAYS.items()]
        groups.append(_group(f"Really generated, {_tokens(length)}", rows))
    return {
        "groups": groups,
        "models": list(models),
        "costs": [_costs(name, draft) for name, draft in measured.items()],
        "generated_tokens": next((one["tokens"] for one in generated.values()), None),
        "left_out": {
            model_title(name): draft["generated_left_out"]
            for name, draft in measured.items()
            if draft.get("generated_left_out")
        },
    }


def _group(title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"title": title, "rows": list(rows)}


def _row(title: str, models: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Cell | None]) -> dict[str, Any]:
    cells = {}
    for name, figures in models.items():
        if (cell := read(figures)) is not None:
            cells[name] = dict(zip(("value", "text", "under"), cell, strict=True))
    return {"title": title, "cells": cells}


def _accepted(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    keys = {"sampled": "acceptance", "greedy": "top1_agreement"}

    def reader(key: str) -> Callable[[Mapping[str, Any]], Cell | None]:
        def read(model: Mapping[str, Any]) -> Cell | None:
            value, error = (model["quality"].get(name) for name in (key, f"{key}_standard_error"))
            under = "" if error is None else f"± {100 * error:.1f}"
            return None if value is None else (value, _percent(value), under)

        return read

    return [_row(title, models, reader(keys[way])) for way, title in _WAYS.items()]


def _of_length(way: str, length: int, read: Callable[[Mapping[str, Any]], Cell]) -> Callable[[Any], Cell | None]:
    return lambda draft: next((read(row[way]) for row in draft["lengths"] if row["length"] == length), None)


def _calls(figures: Mapping[str, Any]) -> Cell:
    along = figures["tokens_per_call_along"]
    return figures["tokens_per_call"], f"{figures['tokens_per_call']:.2f}", "" if along is None else f"text {along:.2f}"


def _speed_up(figures: Mapping[str, Any]) -> Cell:
    return figures["speed_up"], f"{figures['speed_up']:.2f}×", ""


def _really(way: str) -> Callable[[Mapping[str, Any]], Cell | None]:
    def read(generated: Mapping[str, Any]) -> Cell | None:
        figures = generated[way]
        if figures["tokens_per_call"] is None:
            return None
        under = f"{_percent(figures['acceptance'])} accepted, {figures['tokens_per_call']:.2f} tokens a call"
        return figures["speed_up"], f"{figures['speed_up']:.2f}×", under

    return read


def _costs(name: str, draft: Mapping[str, Any]) -> str:
    checks = ", ".join(f"{row['length'] + 1} tokens {row['check_cost']:.2f}" for row in draft["lengths"])
    return (
        f"A token of {model_title(name).lower()} took {milliseconds(draft['draft_step_seconds'])}, "
        f"{draft['draft_cost']:.2f} of the {TEACHER}’s {milliseconds(draft['teacher_step_seconds'])}; the {TEACHER} "
        f"read several at once in so many of its steps: {checks}."
    )


def _tokens(length: int) -> str:
    return f"{length:,} drafted token{'' if length == 1 else 's'}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"

"""A student that is taught by the average of its own weights, in whole distillations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import Interrupted

EMA: dict[str, Any] = {
    "teacher_placement": "ema", "ema": {"decay": 0.8}, "tokens": 6 * 4 * 48,
    "objectives": [{"name": "token_divergence", "top_k": 16, "ce_weight": 0.5}],
}  # fmt: skip


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(
    ("dtype", "first", "then"),
    [pytest.param("bfloat16", {"zero_stage": 1}, {"zero_stage": 1, "async_checkpoints": True}, marks=pytest.mark.long),
     ("float32", {"zero_stage": 0}, {"zero_stage": 2})],
)  # fmt: skip
def test_a_killed_run_goes_on_with_the_average_it_had(
    distil: Callable[..., Any], tmp_path: Path, dies_at_step: Callable[..., Any], dtype: str, first: Any, then: Any
) -> None:
    """At the same stage with the bytes of the unbroken run; at another one with nearly the same losses."""
    whole = distil(tmp_path / "whole", **EMA, dtype=dtype, **then)
    with dies_at_step(4, Interrupted):
        distil(tmp_path / "killed", **EMA, dtype=dtype, **first)
    rows = distil(tmp_path / "killed", **EMA, dtype=dtype, **then)
    student = Path("student") / "model.safetensors"
    if first["zero_stage"] == then["zero_stage"]:
        assert losses(rows) == losses(whole)
        assert (tmp_path / "killed" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()
    assert losses(rows) == pytest.approx(losses(whole), abs=2e-5)
    divergences = [row["kd"] for row in whole if row["kind"] == "train"]
    assert divergences[0] == pytest.approx(0.0, abs=1e-4)  # it begins as the student
    assert divergences[-1] > 1e-3
    validations = [row["kd"] for row in whole if row["kind"] == "validation"]
    assert validations[0] == pytest.approx(0.0, abs=1e-4) and validations[-1] > 1e-3  # not targets of the first one


def test_the_average_may_be_one_of_several_teachers(distil: Callable[..., Any], tmp_path: Path) -> None:
    """Its part of the loss is missing at the start, where it is the student, and there later."""
    settings = {**EMA, "teacher_placement": "replicated"}
    del settings["ema"]
    teachers = [{"name": "own"}, {"name": "average", "teacher_placement": "ema", "ema": {"decay": 0.8}}]
    mixed, alone = distil(tmp_path / "mixed", **settings, teachers=teachers), distil(tmp_path / "alone", **settings)
    first = next((m, a) for m, a in zip(mixed, alone, strict=True) if m["kind"] == "train")
    assert first[0]["kd"] == pytest.approx(0.5 * first[1]["kd"], rel=1e-3)
    assert first[0]["ce"] == pytest.approx(first[1]["ce"], rel=1e-6)

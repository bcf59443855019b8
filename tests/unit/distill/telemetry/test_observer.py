"""What the observer says of a validation."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from kdscale.config.distill.objectives import OBJECTIVES
from kdscale.distill.telemetry.observer import Observer
from kdscale.runtime.progress import Reporter

TERMS = OBJECTIVES["token_divergence"].terms
START = {"tokens": 8.0, "kd": 1.31, "ce": 4.0, "top1_agree": 0.455}


def observer(screen: io.StringIO, at_start: dict[str, float]) -> Observer:
    unused: Any = SimpleNamespace(tokens=8)
    reporter = Reporter(console=Console(file=screen, width=200))
    return Observer(torch.device("cpu"), unused, unused, unused, reporter, TERMS, None, at_start)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_student_that_moves_away_from_the_teacher_is_reported(resumed: bool) -> None:
    """A resumed run compares with the first validation of the whole run, not with its own first."""
    screen = io.StringIO()
    watch = observer(screen, START if resumed else {})
    if not resumed:
        watch.validated(0, START)
    watch.validated(4, {"tokens": 8.0, "kd": 1.59, "ce": 3.0, "top1_agree": 0.366})
    text = screen.getvalue()
    assert text.startswith("step 4: farther from the teacher than at the start")
    assert "divergence from the teacher 1.31 → 1.59, top-1 agreement 45.5 % → 36.6 %" in text


@pytest.mark.parametrize("change", [{"kd": 1.2, "top1_agree": 0.5}, {"kd": 1.3101}, {"kd": math.nan}, {"ce": 9.0}])
def test_a_student_that_does_not_is_not(change: dict[str, float]) -> None:
    screen = io.StringIO()
    observer(screen, START).validated(4, {**START, **change})
    assert screen.getvalue() == ""

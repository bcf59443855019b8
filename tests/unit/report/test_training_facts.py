"""Curves of the training log, whatever its columns."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kdscale.config.distill.objectives import OBJECTIVES
from kdscale.report.training_facts import curves
from kdscale.report.training_plots import terms


def rows(**columns: float) -> list[dict[str, Any]]:
    shared = {"tokens_per_second": 10.0, "skipped": 0}
    train = [{"kind": "train", "step": s, "tokens": 8 * s, "loss": 1 / s, **columns, **shared} for s in range(1, 1001)]
    return [*train, {"kind": "validation", "step": 1000, "tokens": 5, "loss": 0.5, "perplexity": 2.0, **columns}]


def test_every_term_of_an_objective_has_a_curve_under_the_objective_s_title() -> None:
    objective = next(iter(OBJECTIVES.values()))
    names = [term.name for term in objective.terms]
    log = curves(rows(**dict.fromkeys(names, 0.25)))
    assert [term["name"] for term in log["terms"]] == names
    assert [term["title"] for term in log["terms"]] == [term.title for term in objective.terms]
    plot = terms({"curves": log})
    assert plot is not None
    assert all(term.title in plot.alt for term in objective.terms)


def test_an_unknown_column_keeps_its_name_and_long_logs_are_thinned() -> None:
    (term,) = curves(rows(layer_gap=3.0))["terms"]
    assert (term["title"], term["unit"]) == ("layer gap", "")
    assert len(term["train"]) == 240
    assert term["train"][-1] == (1000, pytest.approx(3.0))
    assert term["validation"] == [(1000, 3.0)]


def test_values_that_are_not_finite_are_left_out() -> None:
    log = curves([*rows(), {**rows(ce=math.nan)[0], "step": 1001, "tokens": 8008}, {**rows(ce=1.0)[-1], "step": 1001}])
    assert [term["train"] for term in log["terms"]] == [[]]
    assert log["validation"][-1]["tokens"] == 8008

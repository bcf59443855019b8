"""The table of criteria: every row can be measured, and the config and the docs read it."""

from __future__ import annotations

import inspect

import pytest
from pydantic import ValidationError

from kdscale.config.criteria import AXIS_TITLES, CRITERIA, criteria_table, criterion, methods
from kdscale.config.prune import PruneConfig
from kdscale.families.dims import SHAPE_AXES
from kdscale.prune.importance.collect import look_up


@pytest.mark.parametrize("row", CRITERIA, ids=lambda row: row.name)
def test_a_row_names_functions_that_exist(row):
    parameters = {"collect": 4 + row.in_order if row.own_pass else 1, "finish": 1}
    for field, count in parameters.items():
        if (path := getattr(row, field)) is not None:
            function = look_up(path)
            assert len(inspect.signature(function).parameters) == count
            assert function.__doc__
    assert row.title
    assert row.source


def test_names_are_unique_and_axes_are_known():
    assert len({row.name for row in CRITERIA}) == len(CRITERIA)
    assert {row.axis for row in CRITERIA} == set(SHAPE_AXES) == set(AXIS_TITLES)


def test_the_config_accepts_the_methods_of_the_table_alone():
    for axis, field in {"ffn": "ffn_method", "heads": "head_method", "layers": "layer_method"}.items():
        for method in methods(axis):
            assert PruneConfig(ffn=64, **{field: method}).criterion(axis) == criterion(axis, method)
        with pytest.raises(ValidationError, match=rf"{field}\n.*expected one of .*{', '.join(methods(axis))}"):
            PruneConfig(ffn=64, **{field: "no such method"})
    assert PruneConfig(ffn=64, hidden_method="pca").criterion("hidden").method == "pca"
    assert PruneConfig(ffn=64).criterion("hidden").method == "activation"  # auto, before the family is known
    assert PruneConfig(layers=2).criterion("layers").method == "one_by_one"


def test_the_docs_table_has_every_row():
    table = criteria_table()
    assert all(f"| {row.axis} | `{row.method}` | {row.unit} |" in table for row in CRITERIA)

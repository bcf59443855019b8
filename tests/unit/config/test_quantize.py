"""`quantize`: the forms of the student, what they are called, and what they ask of its widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import build_config, may_change
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.runs.folder import RunFolder
from kdscale.runs.models import is_quantized, model_title, models_of_run


def config(quantize: Any, **more: Any) -> Config:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    return build_config({**tree, "quantize": quantize, **more}, "test")


def test_each_form_is_a_model_of_the_run_with_a_folder_and_a_title_of_its_own() -> None:
    forms = [{"name": "int8"}, {"name": "int4", "method": "rtn", "group": 64}, {"name": "int4"}, {"name": "fp8"}]
    models = models_of_run(RunFolder(Path("r")), config({"forms": forms}), Path("t"))
    assert list(models) == ["teacher", "pruned", "distilled", "int8", "int4_rtn_g64", "int4_gptq_g32", "fp8"]
    assert models["int4_gptq_g32"] == Path("r/quantized/int4_gptq_g32")
    assert [name for name in models if is_quantized(name)] == list(models)[3:]
    titles = [model_title(name) for name in list(models)[2:]]
    assert titles == ["Distilled", "INT8", "INT4 RTN g64", "INT4 GPTQ g32", "FP8"]
    assert list(models_of_run(RunFolder(Path("r")), config(None), Path("t"))) == ["teacher", "pruned", "distilled"]


def test_the_largest_group_is_what_widths_must_be_a_multiple_of() -> None:
    asked = config(
        {"forms": [{"name": "int4", "group": 128}, {"name": "int4", "group": 32}, {"name": "int8"}]}
    ).quantize
    assert asked is not None and asked.multiple == 128
    plain = config({"forms": [{"name": "int8"}, {"name": "fp8"}]}).quantize
    assert plain is not None and plain.multiple == 1


@pytest.mark.parametrize(
    ("quantize", "said"),
    [
        ({"forms": []}, "quantize.forms"),
        ({"forms": [{"name": "int3"}]}, "expected one of int8, int4, fp8, got 'int3'"),
        ({"forms": [{"name": "int4", "group": 48}]}, "group"),
        ({"forms": [{"name": "int4", "groop": 32}]}, "did you mean 'group'"),
        ({"forms": [{"name": "int8", "method": "gptq"}]}, "method"),
        ({"forms": [{"name": "int4"}, {"name": "int4", "damping": 0.1}]}, "int4_gptq_g32 twice"),
        ({"calibration_tokens": 64, "seq_len": 128}, "must be at least seq_len"),
        ({"calibration_tokens": 512, "seq_len": 128, "micro_batch": 4, "processes": 2}, "calibration batches (1)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(quantize: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(quantize)
    assert said in str(refused.value)


def test_the_runs_inside_a_run_have_no_forms_and_a_finished_run_may_be_given_some() -> None:
    outer = config({}, steps=[{"name": "a", "prune": {"ffn": 16}}], correct={})
    correction = outer.correction()
    assert outer.step(0).quantize is None and correction is not None and correction.quantize is None
    assert may_change("quantize") and may_change("quantize.forms")

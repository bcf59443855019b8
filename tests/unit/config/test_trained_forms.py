"""`quantize.forms` with method: distilled: what the training takes of the run's settings, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.config.quantize import Int4Config
from kdscale.config.root import Config
from kdscale.errors import ConfigError


def config(form: dict[str, Any], distill: dict[str, Any] | None = None, **more: Any) -> Config:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}, "distill": distill or {}}
    forms = [{"name": "int4", "method": "rtn"}, {"name": "int4", "method": "distilled", **form}]
    return build_config({**tree, "quantize": {"forms": forms}, **more}, "test")


def training(*args: Any, **more: Any) -> Config:
    outer = config(*args, **more)
    assert outer.quantize is not None
    (form,) = outer.quantize.trained
    return outer.training_on_grid(form)


def test_it_goes_on_as_the_distillation_was_but_on_the_grid_at_a_lower_rate_in_another_order() -> None:
    distill = {"tokens": 1_000_000, "zero_stage": 2, "optimizer": {"lr": 1e-3, "min_lr": 1e-5}}
    inner = training({"group": 64, "lr_share": 0.3}, distill, seed=7, correct={})
    assert inner.run_dir == "r/work/quantize/training-int4_distilled_g64"
    assert (inner.quantize, inner.correct, inner.seed) == (None, None, 8)
    assert inner.distill.fake_quantize is not None
    assert (inner.distill.fake_quantize.bits, inner.distill.fake_quantize.group) == (4, 64)
    assert (inner.distill.tokens, inner.distill.zero_stage) == (100_000, 2)
    optimizer = inner.distill.optimizer
    assert (optimizer.lr, optimizer.min_lr) == (pytest.approx(3e-4), pytest.approx(3e-6))
    assert optimizer.warmup_steps == 100_000 // (8 * 512) // 5  # of a short training no more than a fifth


def test_what_differs_in_it_is_said_in_the_form() -> None:
    changes = {
        "micro_batch": 2,
        "optimizer": {"lr": 5e-5, "warmup_steps": 3},
        "objectives": [{"name": "cross_entropy"}],
    }
    inner = training({"tokens": "20k", "distill": changes}, {"compile": "layers"})
    assert (inner.distill.tokens, inner.distill.micro_batch, inner.distill.compile) == (20_000, 2, "off")
    assert (inner.distill.optimizer.lr, inner.distill.optimizer.warmup_steps) == (5e-5, 3)
    assert [entry.name for entry in inner.distill.objectives] == ["cross_entropy"]


def test_gptq_makes_what_it_begins_with_unless_the_form_says_otherwise() -> None:
    forms = [Int4Config(method="distilled"), Int4Config(method="distilled", start="rtn"), Int4Config(method="gptq")]
    assert [form.starts_from_gptq for form in forms] == [True, False, False]
    assert [form.needs_calibration for form in forms] == [True, False, True]


def test_stored_targets_are_of_the_order_that_they_were_stored_in() -> None:
    stored = {"targets": {"codec": {"name": "topk"}}, "seed": 7}
    assert training({}, {"teacher_placement": "cached"}, **stored).seed == 7


def test_a_token_of_a_service_is_the_runs_own() -> None:
    served = {"teacher_placement": "served", "served": {"urls": ["http://host:1"]}}
    token_file = training({}, served).distill.served.token_file
    assert token_file is not None and token_file.startswith("r/") and "work" not in token_file


def test_the_teachers_correction_is_on_no_grid() -> None:
    corrected = config({}, {"fake_quantize": {}}, correct={}).correction()
    assert corrected is not None and corrected.distill.fake_quantize is None


@pytest.mark.parametrize(
    ("form", "distill", "said"),
    [
        ({"distill": {"tokens": 5}}, {}, "distill.tokens: the form itself says it"),
        ({"distill": {"fake_quantize": {"bits": 8}}}, {}, "distill.fake_quantize: the form itself says it"),
        ({"method": "gptq", "tokens": 4096}, {}, "tokens: for method: distilled, got gptq"),
        (
            {},
            {"tensor_parallel": 2, "processes": 2},
            "(int4_distilled_g32): distill.fake_quantize: does not",
        ),
        ({"distill": {"micro_batch": 3}}, {}, "quantize.forms (int4_distilled_g32): distill.global_batch (8) must be"),
        ({"lr_share": 2.0}, {}, "lr_share"),
        ({"start": "awq"}, {}, "start"),
    ],
)
def test_what_cannot_be_is_refused_by_name(form: dict[str, Any], distill: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(form, distill)
    assert said in str(refused.value)

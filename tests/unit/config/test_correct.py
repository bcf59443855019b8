"""`correct`: what the fine-tuning of the teacher takes of the run's settings, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.distill.targets import TEXT_ALONE
from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError


def config(correct: Any, **distill: Any) -> Config:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    return build_config({**tree, "correct": correct, "distill": distill}, "test")


def test_it_trains_on_text_at_a_fifth_of_the_rate_with_everything_else_as_it_is() -> None:
    inner = config({}, tokens=1_000_000, zero_stage=2, optimizer={"lr": 1e-3, "min_lr": 1e-5}).correction()
    assert inner is not None and inner.correct is None and inner.run_dir == "r/work/correct"
    assert (inner.distill.tokens, inner.distill.zero_stage) == (100_000, 2)
    assert (inner.distill.optimizer.lr, inner.distill.optimizer.min_lr) == (pytest.approx(2e-4), 1e-5)
    assert inner.distill.source is TEXT_ALONE
    assert config(None).correction() is None


def test_what_differs_in_it_is_said_in_its_own_section() -> None:
    inner = config({"tokens": 8192, "lr_share": 0.5, "distill": {"zero_stage": 3, "optimizer": {"warmup_steps": 3}}})
    settings = inner.correction()
    assert settings is not None
    assert (settings.distill.tokens, settings.distill.zero_stage) == (8192, 3)
    assert (settings.distill.optimizer.warmup_steps, settings.distill.optimizer.lr) == (3, pytest.approx(5e-5))


@pytest.mark.parametrize(
    "distill",
    [
        {"teachers": [{"name": "a"}, {"name": "b"}]},
        {"teacher_placement": "served", "served": {"urls": ["http://h:1"]}},
        {"teacher_dtype": "bfloat16"},
        {"teacher_placement": "ema", "objectives": [{"name": "token_divergence", "ce_weight": 0.5}]},
    ],
)
def test_no_setting_on_teachers_touches_it(distill: dict[str, Any]) -> None:
    with_teachers, without = config({}, **distill).correction(), config({}).correction()
    assert with_teachers is not None and without is not None
    assert with_teachers.distill.decisive() == without.distill.decisive()


@pytest.mark.parametrize(
    ("correct", "message"),
    [
        ({"distill": {"objectives": []}}, r"correct\.distill\.objectives: the fine-tuning learns from the text alone"),
        ({"distill": {"tokens": 5}}, r"correct\.distill\.tokens: "),
        ({"distill": {"micro_batch": 3}}, r"correct: distill\.global_batch \(8\) must be a multiple"),
        ({"distill": {"zero_stag": 3}}, r"correct: distill\.zero_stag: unknown key \(did you mean 'zero_stage'"),
        ({"lr_share": 2.0}, r"correct\.lr_share: .*less than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(correct: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(correct)

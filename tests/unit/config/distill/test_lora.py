"""What adapters do not go with, and what the student without them can teach."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.distill.lora import LoraConfig
from kdscale.config.load import build_config
from kdscale.errors import ConfigError

TEXT = {"objectives": [{"name": "token_divergence", "targets": "full", "ce_weight": 0.5}]}
VLLM = {"writer": "vllm", "vllm": {"endpoint": {"base_url": "http://localhost:1/v1", "model": "m"}}}


def build(**distill: Any) -> Any:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    return build_config({**tree, "distill": distill}, "test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 2, "processes": 2}, "does not go with tensor_parallel above 1"),
        ({"fake_quantize": {}}, "does not go with fake_quantize"),
        ({"teacher_placement": "ema", **TEXT}, "does not go with teacher_placement: ema"),
        ({"on_policy": VLLM}, "does not go with on_policy.writer: vllm"),
        ({"teacher_placement": "base"}, "nothing to learn: give ce_weight"),
        ({"teacher_placement": "base", **TEXT, "zero_stage": 3}, "base does not go with zero_stage: 3"),
        (
            {"teachers": [{"name": "a", "teacher_placement": "base"}, {"name": "b"}], "objectives": [
                {"name": "token_divergence", "ce_weight": 0.5}]},
            "base is for the run's own teacher alone",
        ),
    ],
)  # fmt: skip
def test_what_adapters_do_not_go_with_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(lora={}, **settings)


def test_the_base_needs_adapters() -> None:
    with pytest.raises(ConfigError, match="it needs a section lora"):
        build(teacher_placement="base", **TEXT)
    assert build(lora={}, teacher_placement="base", **TEXT).distill.source.is_student


def test_adapters_are_decisive_and_older_runs_without_them_go_on() -> None:
    assert "lora" not in build().distill.decisive()
    assert build(lora={"rank": 8}).distill.decisive()["lora"]["rank"] == 8


def test_trainings_within_a_run_train_all_weights() -> None:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}, "distill": {"lora": {}}}
    form = {"name": "int4", "method": "distilled"}
    config = build_config({**tree, "correct": {}, "quantize": {"forms": [form]}}, "test")
    correction = config.correction()
    assert correction is not None and correction.distill.lora is None and config.quantize is not None
    assert config.training_on_grid(config.quantize.trained[0]).distill.lora is None


def test_the_scale() -> None:
    assert LoraConfig(rank=16, alpha=32).scale == 2.0
    assert LoraConfig(rank=16, alpha=32, rank_stabilised=True).scale == 8.0

"""`distill.zero`: what is refused before any work, and the dictionary that DeepSpeed gets."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.distill.settings import DistillConfig
from kdscale.config.distill.zero import OWNED, PASSED_THROUGH
from kdscale.config.load import build_config, may_change
from kdscale.distill.parallel.deepspeed_config import deepspeed_config
from kdscale.errors import ConfigError


def distill(**settings: Any) -> DistillConfig:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "p"}, "prune": {"ffn": 8}, "distill": settings}
    return build_config(tree, "test").distill


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 0, "zero": {"offload_optimizer": "cpu"}}, "offload_optimizer needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 2, "zero": {"offload_parameters": "cpu"}}, "offload_parameters needs zero_stage 3, got 2"),
        ({"zero_stage": 3, "zero": {"offload_optimizer": "nvme"}}, "needs a folder on a local NVMe disk"),
        ({"zero_stage": 1, "zero": {"offload_optimizer": "nvme", "nvme_path": "/x"}}, "nvme needs zero_stage 3"),
        (
            {"zero_stage": 3, "async_checkpoints": True, "zero": {"offload_optimizer": "nvme", "nvme_path": "/x"}},
            "async_checkpoints: would hold",
        ),
        ({"zero_stage": 3, "zero": {"offload_optimizer": "cpu", "nvme_path": "/x"}}, "nothing is offloaded to nvme"),
        ({"zero_stage": 3, "zero": {"hpz_partition_size": 2}}, r"hpz_partition_size \(2\) must divide processes \(1\)"),
        ({"zero_stage": 1, "zero": {"quantized_gradients": True}}, "quantized_gradients needs zero_stage 3"),
        ({"zero_stage": 2, "zero": {"keep_gathered": "1B"}}, "keep_gathered needs zero_stage 3"),
        (
            {"zero_stage": 3, "zero": {"keep_gathered": "1B", "offload_parameters": "cpu"}},
            "keep_gathered would hold on the device",
        ),
        ({"zero": {"extra": {"stage3_param_persistence_threshold": 0}}}, "set by distill.zero.keep_gathered"),
        ({"zero": {"extra": {"stage": 3}}}, "extra.stage: set by distill.zero_stage"),
        ({"zero": {"extra": {"gradient_clipping": 1.0}}}, "set by distill.optimizer.gradient_clipping"),
        ({"zero": {"extra": {"overlap_com": True}}}, "did you mean 'overlap_comm'"),
        ({"zero": {"extra": {"overlap_comm": 1}}}, "expected true or false, got 1"),
        ({"zero": {"extra": {"sub_group_size": True}}}, "expected an integer of 0 or more, got True"),
        ({"zero": {"offload_optimizr": "cpu"}}, "did you mean 'offload_optimizer'"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(**settings)


def test_the_defaults() -> None:
    sent = deepspeed_config(distill(global_batch=24, micro_batch=2, processes=3), 2, bf16=True, device="cpu")
    assert sent == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    assert deepspeed_config(distill(), 0, bf16=False, device="cpu")["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("zero", "bf16", "added", "sent"),
    [
        ({}, False, None, None),  # fp32 training has no other sums
        ({"gradient_dtype": "bfloat16"}, True, None, None),
        ({"quantized_gradients": True}, True, {"grad_accum_dtype": "fp32"}, None),  # int4 on the way
    ],
)
def test_gradients_are_widened_only_where_that_means_something(
    zero: dict[str, Any], bf16: bool, added: dict[str, str] | None, sent: str | None
) -> None:
    config = deepspeed_config(distill(zero_stage=3, zero=zero), 3, bf16=bf16, device="cuda")
    assert (config.get("data_types"), config.get("communication_data_type")) == (added, sent)


def test_the_sums_of_gradients_are_part_of_what_a_student_depends_on() -> None:
    plain, coarse = distill(), distill(zero={"gradient_dtype": "bfloat16"})
    assert plain.decisive() != coarse.decisive()
    assert plain.decisive() == distill(zero={"reduce_bucket": "1M"}).decisive()
    assert not may_change("distill.zero.gradient_dtype")


def test_every_option_reaches_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {
        "offload_optimizer": "nvme", "offload_parameters": "cpu", "nvme_path": "/nvme", "pin_memory": True,
        "hpz_partition_size": 2, "quantized_weights": True, "quantized_gradients": True, "reduce_bucket": "1M",
        "allgather_bucket": "2M", "extra": {"overlap_comm": False, "stage3_prefetch_bucket_size": 7},
    }  # fmt: skip
    cfg = distill(zero_stage=3, processes=4, global_batch=16, zero=zero)
    read = DeepSpeedZeroConfig(**deepspeed_config(cfg, 3, bf16=True, device="cuda")["zero_optimization"])
    assert (read.stage, read.reduce_bucket_size, read.allgather_bucket_size) == (3, 10**6, 2 * 10**6)
    assert (read.offload_optimizer.device, str(read.offload_optimizer.nvme_path)) == ("nvme", "/nvme")
    assert (read.offload_param.device, read.offload_param.pin_memory) == ("cpu", True)
    assert (read.zero_hpz_partition_size, read.zero_quantized_weights, read.zero_quantized_gradients) == (2, True, True)
    assert (read.overlap_comm, read.prefetch_bucket_size) == (False, 7)


def test_all_that_may_pass_through_is_known_to_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {field.alias or name for name, field in fields.items()}
    assert set(PASSED_THROUGH) <= known
    assert not set(PASSED_THROUGH) & set(OWNED)
    values = {bool: True, int: 3}
    read = DeepSpeedZeroConfig(stage=3, **{key: values[value_type] for key, value_type in PASSED_THROUGH.items()})
    assert read.sub_group_size == 3


def test_a_config_survives_being_written_out() -> None:
    cfg = distill(zero_stage=3, zero={"offload_parameters": "cpu", "extra": {"sub_group_size": 5}})
    assert DistillConfig.model_validate(cfg.model_dump(mode="json")) == cfg

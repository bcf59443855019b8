"""The dictionary that DeepSpeed is initialised with, made from a config without deepspeed or torch."""

from __future__ import annotations

import os
from typing import Any

from kdscale.config.distill.settings import DistillConfig
from kdscale.config.distill.zero import OffloadDevice, ZeroConfig
from kdscale.errors import ConfigError

# Elements per collective; stages 2 and 3 allocate a buffer of that many.
BUCKET = {"cuda": 500_000_000, "cpu": 50_000_000}


def deepspeed_config(cfg: DistillConfig, stage: int, *, bf16: bool, device: str) -> dict[str, Any]:
    """The config of the engine. `stage` is the one in effect (stage 0 in bf16 runs as 1), `device` "cuda" or "cpu"."""
    tensor = {"tensor_parallel": {"autotp_size": cfg.tensor_parallel}} if cfg.tensor_parallel > 1 else {}
    return {
        **tensor,
        "train_micro_batch_size_per_gpu": cfg.micro_batch,
        "gradient_accumulation_steps": cfg.global_batch // (cfg.micro_batch * cfg.data_parallel),
        # DeepSpeed has a default of its own; at stage 0 our optimiser clips
        "gradient_clipping": cfg.optimizer.gradient_clipping if stage else 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        **(_fp32_gradients(cfg.zero) if bf16 and cfg.zero.gradient_dtype == "float32" else {}),
        "zero_optimization": zero_optimization(cfg.zero, stage, device),
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def _fp32_gradients(zero: ZeroConfig) -> dict[str, Any]:
    """What makes DeepSpeed add bf16 gradients up in fp32: those of micro-batches, and those of ranks.

    A rank's fp32 sum would otherwise be rounded to bf16 on its way to the others. Quantised gradients have their own
    format on the way. At stage 1 each gradient goes into the sum as soon as it exists, so that no bf16 copy of all of
    them waits beside it.
    """
    out: dict[str, Any] = {
        "bf16": {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    return out if zero.quantized_gradients else {**out, "communication_data_type": "fp32"}


def zero_optimization(zero: ZeroConfig, stage: int, device: str) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`: only what differs from its defaults, and the bucket sizes."""
    out: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": zero.reduce_bucket or BUCKET[device],
        "allgather_bucket_size": zero.allgather_bucket or BUCKET[device],
    }
    pinned = zero.pin_memory and device == "cuda"
    if zero.offload_optimizer != "none":
        out["offload_optimizer"] = _offload(zero.offload_optimizer, zero.nvme_path, pinned)
    if zero.offload_parameters != "none":
        out["offload_param"] = _offload(zero.offload_parameters, zero.nvme_path, pinned)
    if zero.hpz_partition_size > 1:
        out["zero_hpz_partition_size"] = zero.hpz_partition_size
    if zero.keep_gathered is not None:
        for key in ("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"):
            out[key] = zero.keep_gathered
    for key, wanted in (
        ("zero_quantized_weights", zero.quantized_weights),
        ("zero_quantized_gradients", zero.quantized_gradients),
    ):
        if wanted:
            out[key] = True
    return {**out, **zero.extra}


def _offload(device: OffloadDevice, nvme_path: str | None, pinned: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"device": device, "pin_memory": pinned}
    return {**out, "nvme_path": nvme_path} if device == "nvme" else out


def check_machine(zero: ZeroConfig, device: str) -> None:
    """Raise ConfigError for what this machine cannot do, before any weight is read.

    `ZeroConfig.problems` checks what does not depend on the machine.
    """
    for name in ("quantized_weights", "quantized_gradients"):
        if getattr(zero, name) and device != "cuda":
            raise ConfigError(
                f"distill.zero.{name}", expected="GPUs", got="a CPU, for which DeepSpeed has no quantiser"
            )
    if zero.nvme_path is not None and not os.access(zero.nvme_path, os.W_OK | os.X_OK):
        raise ConfigError(
            "distill.zero.nvme_path", expected="a folder that can be written to", got=zero.nvme_path,
            hint="make the folder on every node",
        )  # fmt: skip

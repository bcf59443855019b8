"""`distill.zero`: the options of DeepSpeed's ZeRO besides the stage, checked before DeepSpeed is loaded.

The keys that this project depends on (stage, offload, bucket sizes) have fields of their own; other keys of DeepSpeed's
`zero_optimization` pass through `extra`, checked by name and type.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from kdscale.config.fields import MOST, Count, Few, Section
from kdscale.units import parse_count

OffloadDevice = Literal["none", "cpu", "nvme"]
# what each key may hold is checked by _check_extra
ExtraValue = bool | Annotated[int, Field(ge=0, le=MOST)] | Annotated[float, Field(ge=0, le=MOST)] | str

# Keys of DeepSpeed's `zero_optimization` (0.19) that change only speed or memory, with the type each must have.
PASSED_THROUGH: dict[str, type] = {
    "allgather_partitions": bool,
    "contiguous_gradients": bool,
    "enable_sanity_checks": bool,
    "ignore_unused_parameters": bool,
    "log_trace_cache_warnings": bool,
    "memory_efficient_linear": bool,
    "overlap_comm": bool,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
    "stage3_allgather_sequential": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_module_granularity_threshold": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "sub_group_size": int,
    "use_multi_rank_bucket_allreduce": bool,
}

# Keys that people know from DeepSpeed's JSON, and where a kdscale config sets the same.
OWNED: dict[str, str] = {
    "stage": "distill.zero_stage",
    "offload_optimizer": "distill.zero.offload_optimizer",
    "cpu_offload": "distill.zero.offload_optimizer",
    "offload_param": "distill.zero.offload_parameters",
    "cpu_offload_param": "distill.zero.offload_parameters",
    "cpu_offload_use_pin_memory": "distill.zero.pin_memory",
    "pin_memory": "distill.zero.pin_memory",
    "zero_hpz_partition_size": "distill.zero.hpz_partition_size",
    "zero_quantized_weights": "distill.zero.quantized_weights",
    "zero_quantized_gradients": "distill.zero.quantized_gradients",
    "stage3_model_persistence_threshold": "distill.zero.keep_gathered",
    "stage3_param_persistence_threshold": "distill.zero.keep_gathered",
    "reduce_bucket_size": "distill.zero.reduce_bucket",
    "allgather_bucket_size": "distill.zero.allgather_bucket",
    "gradient_clipping": "distill.optimizer.gradient_clipping",
    "optimizer": "distill.optimizer",
    "scheduler": "distill.optimizer.warmup_steps and min_lr",
    "bf16": "distill.dtype",
    "data_types": "distill.zero.gradient_dtype",
    "grad_accum_dtype": "distill.zero.gradient_dtype",
    "communication_data_type": "distill.zero.gradient_dtype",
    "fp16": "distill.dtype (fp16 is not offered: bfloat16 needs no loss scale)",
    "train_batch_size": "distill.global_batch",
    "train_micro_batch_size_per_gpu": "distill.micro_batch",
    "gradient_accumulation_steps": "distill.global_batch, which is micro_batch × processes × accumulation",
    "compute_grad_norm": "nothing: the norm is always needed, for clipping and to skip bad steps",
    "zero_quantized_nontrainable_weights": "nothing: the student has no frozen weights",
}


class ZeroConfig(Section):
    """Sums of gradients, offload, ZeRO++ and bucket sizes. `problems` says what a stage cannot do."""

    # in which bf16 training adds up the gradients of micro-batches and of ranks; bfloat16 halves their memory and
    # traffic, but a long sum loses what is small beside it
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    # fp32 masters, Adam's moments and its step in host memory (stages 1 to 3) or on NVMe (stage 3)
    offload_optimizer: OffloadDevice = "none"
    offload_parameters: OffloadDevice = "none"  # stage 3: each rank's share of the weights
    nvme_path: str | None = None  # a folder on a local NVMe disk
    pin_memory: bool = True  # of what is offloaded to host memory; without effect where training runs on a CPU
    # ZeRO++ (arXiv 2306.10209), stage 3: each group of this many ranks keeps all weights, so that the backward gathers
    # within it; int8 weights in the forward's gather; int4 gradients in the reduction
    hpz_partition_size: Few = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False
    # stage 3: weights of so many parameters together stay gathered over the micro-batches of a step; null: those of at
    # most 100,000 each (DeepSpeed's own)
    keep_gathered: Annotated[int, Field(ge=0, le=MOST), BeforeValidator(parse_count)] | None = None
    # elements per collective; None: 500M with GPUs, 50M on a CPU
    reduce_bucket: Count | None = None
    allgather_bucket: Count | None = None
    extra: dict[str, ExtraValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _holds_together(self) -> ZeroConfig:
        for key, value in self.extra.items():
            _check_extra(key, value)
        to_nvme = [name for name in ("offload_optimizer", "offload_parameters") if getattr(self, name) == "nvme"]
        if to_nvme and not self.nvme_path:
            raise ValueError(f"nvme_path: {to_nvme[0]} nvme needs a folder on a local NVMe disk")
        if self.nvme_path and not to_nvme:
            raise ValueError("nvme_path: nothing is offloaded to nvme")
        return self

    def problems(self, stage: int, processes: int) -> list[str]:
        """What these settings cannot do at this ZeRO stage with this many ranks, one sentence each."""
        out = []
        if self.offload_optimizer != "none" and stage == 0:
            out.append("zero.offload_optimizer needs zero_stage 1, 2 or 3, got 0")
        for name, wanted in (
            ("offload_optimizer nvme", self.offload_optimizer == "nvme"),
            ("offload_parameters", self.offload_parameters != "none"),
            ("hpz_partition_size", self.hpz_partition_size > 1),
            ("keep_gathered", self.keep_gathered is not None),
            ("quantized_weights", self.quantized_weights),
            ("quantized_gradients", self.quantized_gradients),
        ):
            if wanted and stage != 3:
                out.append(f"zero.{name} needs zero_stage 3, got {stage}")
        if self.keep_gathered and self.offload_parameters != "none":
            out.append("zero.keep_gathered would hold on the device what zero.offload_parameters takes off it")
        if processes % self.hpz_partition_size:
            out.append(f"zero.hpz_partition_size ({self.hpz_partition_size}) must divide processes ({processes})")
        return out


def _check_extra(key: str, value: ExtraValue) -> None:
    if key in OWNED:
        raise ValueError(f"extra.{key}: set by {OWNED[key]}")
    if key not in PASSED_THROUGH:
        near = difflib.get_close_matches(key, PASSED_THROUGH, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"extra.{key}: not a key of zero_optimization that may be passed through{hint}")
    value_type = PASSED_THROUGH[key]
    if type(value) is not value_type or (value_type is int and isinstance(value, int) and value < 0):
        expected = "true or false" if value_type is bool else "an integer of 0 or more"
        raise ValueError(f"extra.{key}: expected {expected}, got {value!r}")

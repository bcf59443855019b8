"""A small config of every family, in the family's own field names, and transformers' own of it."""

from __future__ import annotations

from typing import Any

from kdscale.families import Dims, load_family, supported_types
from kdscale.families.layer_fields import product_of
from kdscale.families.schema import FamilyData

SIZES = {
    "hidden": 48, "ffn": 80, "layers": 3, "heads": 6, "kv_heads": 2, "vocab": 96, "experts": 4, "ssm_heads": 6,
    "ssm_head_dim": 8, "ssm_groups": 2, "ssm_state": 12,
}  # fmt: skip
_GEMMA_4 = {
    "attention_k_eq_v": True,
    "global_head_dim": 20,
    "num_global_key_value_heads": 1,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_MIXED = ["linear_attention", "full_attention", "linear_attention"]
# What makes a family's layers be of all their kinds, and its rotary positions be there.
_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma4_text": {**_GEMMA_4, "hidden_size_per_layer_input": 0},
    "gemma4_text_moe": {
        **_GEMMA_4,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 40,
    },
    "gemma4_unified_text": _GEMMA_4,
    "granitemoehybrid": {"layer_types": _MIXED, "num_local_experts": 0, "position_embedding_type": "rope"},
    "granitemoehybrid_moe": {"layer_types": _MIXED, "position_embedding_type": "rope"},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "nemotron_h_moe": {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
    "qwen3_5_text": {"layer_types": _MIXED},
    "qwen3_5_moe_text": {"layer_types": _MIXED},
    "qwen3_next": {"layer_types": _MIXED},
}
# Files about some configs of a model type that has two: the type.
_TYPES = {"gemma4_text_moe": "gemma4_text", "granitemoehybrid_moe": "granitemoehybrid", "nemotron_h_moe": "nemotron_h"}
# By model type or file; also those of KDSCALE_FAMILIES.
FAMILIES = {
    name: load_family({"model_type": _TYPES.get(name, name), **_SPECIAL.get(name, {})}, "config.json").data
    for name in (*supported_types(), *_TYPES)
}


def tied_kv_heads(data: FamilyData) -> bool:
    """Whether every query head has keys and values of its own."""
    return any(rule.dim == "kv_heads" and rule.equals == "heads" for rule in data.constraints)


def small_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """The sizes above under the family's own field names."""
    data = FAMILIES[model_type]
    sizes = {field.field: SIZES[dim] for dim, field in data.dims.items() if field.field and dim in SIZES}
    if data.experts_per_token is not None:
        sizes[data.experts_per_token.field] = 2
    if (head_dim := data.dims["head_dim"]).field and head_dim.absent is None:
        sizes[head_dim.field] = 8
    sizes |= {product.field: product_of(product, Dims(**SIZES, head_dim=8)) for product in data.products}
    if tied_kv_heads(data):
        sizes[data.dims["kv_heads"].field] = SIZES["heads"]
    return {
        "model_type": _TYPES.get(model_type, model_type),
        **_TOKENS,
        **sizes,
        **_SPECIAL.get(model_type, {}),
        **changes,
    }


def transformers_config(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)

"""One tiny random teacher a family, and the cuts that its table is run with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdscale import families
from kdscale.config.criteria import FOLLOWED
from kdscale.families import Dims, Family, load_family
from kdscale.families.layer_fields import product_of
from kdscale.models.loading import auto_class

SIZES = {
    "dense_ffn": 80, "hidden": 32, "ffn": 48, "layers": 3, "heads": 4, "kv_heads": 2, "vocab": 64, "experts": 4,
    "ssm_heads": 6, "ssm_head_dim": 8, "ssm_groups": 2, "ssm_state": 12,
}  # fmt: skip
POSITIONS = 128
COMMON: dict[str, Any] = {
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Latent attention with four sizes of its own.
MLA = {
    "q_lora_rank": 10, "kv_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "initializer_range": 0.1,
    "hidden_size_per_layer_input": 0, "final_logit_softcapping": 3.0,
}  # fmt: skip
# all layers have values of their own, and as many kv heads
GEMMA4_UNIFIED: dict[str, Any] = {
    **{key: value for key, value in GEMMA4.items() if key != "hidden_size_per_layer_input"}, "attention_k_eq_v": False,
}  # fmt: skip
# each layer has an input of its own, and the last two read keys and values of others
GEMMA4_SMALL: dict[str, Any] = {
    **GEMMA4, "attention_k_eq_v": False, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full")],
    "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 64,
}  # fmt: skip
DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 8,
    "linear_conv_kernel_dim": 4, "initializer_range": 0.1,
}  # fmt: skip
GRANITE_HYBRID: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "position_embedding_type": "rope",
    "mamba_d_head": 48,
    "mamba_expand": 9,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
}
NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "full_attention", "mlp"],
    "head_dim": 12,
    "mamba_d_conv": 4,
    "conv_kernel": 4,
    "chunk_size": 16,
    "mlp_hidden_act": "relu2",
}
# What a family's tiny teacher has besides the sizes above; a family that is not here has nothing.
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 9, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 9, "sliding_window_pattern": 2},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4_UNIFIED,
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 5,
        "intermediate_size_mlp": 80,
        "moe_layers": [0, 2],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 12,
        "floor_scale": 64,
    },
    "phi3": {"sliding_window": 16, "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "ministral": {"head_dim": 12, "sliding_window": 8},
    "ministral3": {"head_dim": 12, "rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, **_YARN}},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "exaone4": {"head_dim": 12, "sliding_window": 8, "sliding_window_pattern": 2},
    "ernie4_5": {"head_dim": 12, "use_bias": True},
    "hunyuan_v1_dense": {"head_dim": 12},
    "seed_oss": {"head_dim": 12, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "nemotron": {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "cohere": {"head_dim": 12, "use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"num_key_value_heads": 4, "sliding_window": 8, "sliding_window_pattern": 2, "logit_scale": 0.5},
    "apertus": {"head_dim": 12, "rope_parameters": {"rope_theta": 1e4, **_YARN}},
    "stablelm": {"num_key_value_heads": 4, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": 16},
    "mixtral": {"sliding_window": 16},
    "qwen3_moe": {"num_experts": 5, "head_dim": 12},
    "olmoe": {"num_key_value_heads": 4, "num_experts_per_tok": 3, "clip_qkv": 2.0},
    "glm4_moe": {"first_k_dense_replace": 1, "n_shared_experts": 2, "use_qk_norm": True, "attention_bias": True},
    "deepseek_v3": {**MLA, "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 2},
    "deepseek_v2": {**MLA, "q_lora_rank": None, "first_k_dense_replace": 1, "n_routed_experts": 5},
    "ernie4_5_moe": {"moe_num_experts": 5, "moe_layer_start_index": 1, "use_bias": True, "initializer_range": 0.3},
    "gpt_oss": {"num_local_experts": 5, "head_dim": 12, "sliding_window": 8, "rope_parameters": ROPE},
    "granitemoe": {"residual_multiplier": 0.5, "logits_scaling": 4.0, "num_local_experts": 5},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"attn_pdrop": 0.0},
    "falcon_h1": {
        "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.25,
        "mlp_multipliers": [0.5, 0.25],
        "key_multiplier": 0.5,
        "attention_in_multiplier": 0.75,
        "attention_out_multiplier": 0.5,
        "ssm_in_multiplier": 0.75,
        "ssm_out_multiplier": 0.5,
        "ssm_multipliers": [0.5, 0.75, 1.25, 0.8, 1.5],
        "head_dim": 12,
        "mamba_chunk_size": 16,
        "mamba_d_conv": 4,
        "mamba_rms_norm": True,
    },
    "granitemoehybrid": {**GRANITE_HYBRID, "num_local_experts": 0},
    "nemotron_h": NEMOTRON_H,
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 16,
        "intermediate_size": 70,
        "head_dim": 12,
        "conv_bias": True,
        "conv_L_cache": 3,
    },
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": {**DELTA_NET, "num_experts": 5, "shared_expert_intermediate_size": 30},
    "qwen3_next": {
        **DELTA_NET,
        "num_experts": 5,
        "shared_expert_intermediate_size": 30,
        "mlp_only_layers": [0],
        "initializer_range": 0.07,
    },
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    **{name: {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2} for name in ("roberta", "xlm-roberta")},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
}
# Teachers of the table besides one a family: the family, and what else its tiny teacher has.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text, experts": (
        "gemma4_text",
        {**GEMMA4, "enable_moe_block": True, "num_experts": 5, "moe_intermediate_size": 48, "intermediate_size": 40},
    ),
    "gemma4_text, small": ("gemma4_text", GEMMA4_SMALL),
    "granitemoehybrid, experts": (
        "granitemoehybrid",
        {**GRANITE_HYBRID, "num_local_experts": 5, "shared_intermediate_size": 30, "intermediate_size": 48},
    ),
    "nemotron_h, experts": (
        "nemotron_h",
        {
            **NEMOTRON_H,
            "layers_block_type": ["linear_attention", "full_attention", "moe"],
            "n_routed_experts": 6,
            "n_group": 2,
            "initializer_range": 0.1,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 30,
        },
    ),
    "nemotron_h, experts in a latent": (
        "nemotron_h",
        {
            **NEMOTRON_H,
            "layers_block_type": ["linear_attention", "full_attention", "moe"],
            "n_routed_experts": 5,
            "initializer_range": 0.1,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 30,
            "moe_latent_size": 20,
        },
    ),
    "qwen3_moe, two kinds": ("qwen3_moe", {"num_experts": 5, "mlp_only_layers": [1], "intermediate_size": 80}),
}
# Every axis once. What is cut together is compared in different places, so that a failure still names the axis.
CUTS: tuple[dict[str, int], ...] = ({"heads": 2, "layers": 2}, {"kv_heads": 1, "ffn": 32}, {"hidden": 24})
ALL = {"ffn": 24, "heads": 2, "kv_heads": 1, "hidden": 24, "layers": 2}
# Without a field for head_dim the hidden size is heads · head_dim, and they are cut together.
TOGETHER = {"heads": 3, "kv_heads": 3, "hidden": 24}
EXPERTS = {"experts": 3}
OF_SOME = {**EXPERTS, "ssm_heads": 4, "ssm_head_dim": 6, "ssm_state": 8}


def cuts_of(family: Family) -> tuple[dict[str, int], ...]:
    """Cuts that between them shorten each axis of the family."""
    if _own_keys(family):
        cuts: tuple[dict[str, int], ...] = ({"kv_heads": 2, "layers": 2}, {"ffn": 32}, {"hidden": 24})
    else:
        cuts = CUTS if family.data.dims["head_dim"].field is not None else ({"ffn": 32, "layers": 2}, TOGETHER)
    cuts = (*cuts, *([only] if (only := _of_some(family)) else []))
    return tuple({axis: size for axis, size in cut.items() if axis not in family.data.uncut} for cut in cuts)


def cut_of_all(family: Family) -> dict[str, int]:
    """One cut of all axes of the family."""
    together = TOGETHER if family.data.dims["head_dim"].field is None else {}
    if _own_keys(family):
        together = {"heads": 2, "kv_heads": 2}
    cut = {**ALL, **together, **_of_some(family)}
    return {axis: size for axis, size in cut.items() if axis not in family.data.uncut}


def _of_some(family: Family) -> dict[str, int]:
    """A cut of the axes that not all families have; two experts of each group of three where there are groups."""
    cut = {axis: size for axis, size in OF_SOME.items() if axis in family.data.dims}
    cut |= {"experts": 4} if family.expert_groups[0] == 2 else {}
    return cut | ({"ssm_head_dim": 24} if family.data.products and family.data.products[0].over else {})


def _own_keys(family: Family) -> bool:
    """Whether every query head has keys and values of its own, but the hidden size is free."""
    return any(rule.dim == "kv_heads" and rule.equals == "heads" for rule in family.data.constraints)


def tiny_config(model_type: str, architecture: str | None = None) -> dict[str, Any]:
    """The sizes above under the family's own field names, and what is special about a family or variant.

    Of an encoder with the head of `architecture`, by default of the first one in its family file.
    """
    model_type, changes = VARIANTS.get(model_type, (model_type, SPECIAL.get(model_type, {})))
    chosen = architecture or architectures(model_type)[0]
    data = load_family({"model_type": model_type, "architectures": [chosen], **changes}, "config.json").data
    sizes = {field.field: SIZES[dim] for dim, field in data.dims.items() if field.field and dim in SIZES}
    sizes |= {str(field.field): POSITIONS for name, field in data.sizes.items() if name == "positions"}
    if data.experts_per_token is not None:
        sizes[str(data.experts_per_token.field)] = 2
    sizes |= {product.field: product_of(product, Dims(**SIZES, head_dim=8)) for product in data.products}
    own = {"architectures": [chosen]} if data.is_encoder else {}
    return {"model_type": model_type, **COMMON, **sizes, **own, **changes}


def architectures(model_type: str) -> tuple[str, ...]:
    """The architectures of a family file."""
    found: tuple[str, ...] = families._families()[model_type][0].architectures
    return found


def save_teacher(model_type: str, folder: Path, architecture: str | None = None, **changes: Any) -> Path:
    """A random model as transformers saves it, its one-dimensional weights away from 0 and 1."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(5)
    config = AutoConfig.for_model(**{**tiny_config(model_type, architecture), **changes})
    model = auto_class(config.to_dict()).from_config(config)
    with torch.no_grad():
        corrections = [item for item in model.named_buffers() if item[0].endswith(("bias", "layer_scalar"))]
        for name, value in [*model.named_parameters(), *corrections]:
            if value.ndim == 1 or name.endswith("bias"):
                value.add_(torch.randn_like(value) * (0.3 if "bias" in name else 0.2))
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """None removes a field: configs on the hub lack what newer versions of transformers write out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def random_scores(config: dict[str, Any], family: Family) -> dict[str, np.ndarray]:
    """Scores that keep units scattered over each axis, so that a slice of the first ones would show."""
    dims, rng = family.dims(config), np.random.default_rng(3)
    shapes = {
        "ffn.output_energy": (dims.layers, dims.experts, dims.ffn) if dims.experts else (dims.layers, dims.ffn),
        "heads.output_energy": (dims.layers, dims.heads),
        "kv_heads.output_energy": (dims.layers, dims.kv_heads),
        "hidden.activation": (dims.hidden,),
        "layers.one_by_one": (dims.layers,),
        "experts.output_norm": (dims.layers, dims.experts),
        "ssm_heads.output_energy": (dims.layers, dims.ssm_heads),
        "ssm_head_dim.output_energy": (dims.layers, dims.ssm_head_dim),
        "ssm_state.output_energy": (dims.layers, dims.ssm_state),
    }
    shapes |= {f"{axis}.output_energy": (dims.layers, getattr(dims, axis)) for axis in FOLLOWED}
    scores = {name: rng.random(shape) for name, shape in shapes.items()}
    scores["layers.one_by_one"][0] = 0.0  # so that kept layers get other numbers
    return scores

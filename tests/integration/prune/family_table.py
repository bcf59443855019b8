"""One tiny random teacher a family, and the cuts that its table is run with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kdscale.families import Family

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# What makes each one itself, on top of the sizes above: None removes a size that the family does not have.
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 9, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 9, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 16, "partial_rotary_factor": 0.5},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "sliding_window": 16},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 12},
    "olmoe": {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 3, "clip_qkv": 2.0},
    "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.5},
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None, "n_inner": 48, "attn_pdrop": 0.0},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
}
CUTS: dict[str, dict[str, int]] = {
    "ffn": {"ffn": 32},
    "heads": {"heads": 2},
    "kv_heads": {"kv_heads": 1},
    "hidden": {"hidden": 24},
    "layers": {"layers": 2},
}
ALL = {"ffn": 24, "heads": 2, "kv_heads": 1, "hidden": 24, "layers": 2}
# Without a field for head_dim the hidden size is heads · head_dim, and they are cut together.
TOGETHER = {"heads": 3, "kv_heads": 3, "hidden": 24}
EXPERTS = {"experts": 3}


def cuts_of(family: Family) -> dict[str, dict[str, int]]:
    """One cut for each axis of the family, and one of all axes together."""
    cuts, everything = CUTS, ALL
    if family.data.dims["head_dim"].field is None:
        cuts = {"ffn": CUTS["ffn"], "hidden": TOGETHER, "layers": CUTS["layers"]}
        everything = {**ALL, **TOGETHER}
    if family.sites.experts:
        cuts, everything = {**cuts, "experts": EXPERTS}, {**everything, **EXPERTS}
    return {**cuts, "all": everything}


def save_teacher(model_type: str, folder: Path, **changes: Any) -> Path:
    """A random model as transformers saves it, its one-dimensional weights away from 0 and 1."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    fields = {**BASE, **TEACHERS.get(model_type, {}), **changes}
    torch.manual_seed(5)
    config = AutoConfig.for_model(model_type, **{key: value for key, value in fields.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * (0.3 if "bias" in name else 0.2))
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """None removes a field: configs on the hub lack what newer versions of transformers write out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

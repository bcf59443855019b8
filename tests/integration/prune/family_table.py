"""One tiny random teacher a family, and the cuts that its table is run with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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

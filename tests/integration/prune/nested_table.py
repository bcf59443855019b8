"""Tiny random models of several modalities, one for each file about them, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.integration.prune.family_table import GEMMA4_SMALL, GEMMA4_UNIFIED

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
IMAGE = {"image_size": 28, "patch_size": 14}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **IMAGE,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
QWEN_VISION = {"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 14}
QWEN3_5 = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": {**MROPE, "mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25},
}  # fmt: skip
QWEN3_5_VISION = {**QWEN_VISION, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16}
WHOLE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 9},
        "vision_config": SIGLIP, "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {key: value for key, value in GEMMA4_SMALL.items() if key != "initializer_range"},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 14, "position_embedding_size": 16,
        },
        "audio_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [4, 4],
            "output_proj_dims": 12,
        },
    },
    "gemma4_unified": {
        "text_config": {key: value for key, value in GEMMA4_UNIFIED.items() if key != "initializer_range"},
        "vision_config": {
            "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16,
        },
        "audio_config": {"audio_embed_dim": 12},
    },
    "llama4": {
        "text_config": {
            "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size_mlp": 80, "moe_layers": [0, 2],
            "no_rope_layers": [1, 0, 1], "attention_chunk_size": 12,
        },
        "vision_config": {
            **VISION, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION},
    },
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": CLIP},
    "llava_next": {"text_config": {"model_type": "mistral"}, "vision_config": CLIP},
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {"model_type": "internvl_vision", **VISION, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "qwen2_vl": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "intermediate_size": 24, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": {
            **QWEN_VISION, "intermediate_size": 24, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
    },
    "qwen3_5": {"text_config": QWEN3_5, "vision_config": QWEN3_5_VISION},
    "qwen3_5_moe": {
        "text_config": {
            **QWEN3_5, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 30,
        },
        "vision_config": QWEN3_5_VISION,
    },
    "smolvlm": {"text_config": {"model_type": "llama"}, "vision_config": VISION},
    "idefics3": {"text_config": {"model_type": "llama"}, "vision_config": VISION},
}  # fmt: skip


def save_whole(model_type: str, folder: Path, **text: Any) -> Path:
    """A random model as transformers saves it; `text` changes its language model's config."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(5)
    fields = WHOLE[model_type]
    config = AutoConfig.for_model(model_type, **{**fields, "text_config": {**TEXT, **fields["text_config"], **text}})
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1 or not value.any():
                value.add_(torch.randn_like(value) * 0.2)
    model.save_pretrained(folder)
    return folder


def load_whole(folder: Path) -> Any:
    """With transformers alone; no tensor missing, left over or of another shape."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()

"""Small configs and random scores for planning tests; nothing here needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdscale.families import Family, load_family


@pytest.fixture
def small_config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
        "tie_word_embeddings": True,
    }


@pytest.fixture
def llama8b_config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }


@pytest.fixture
def small_family(small_config: dict[str, Any]) -> Family:
    return load_family(small_config, "config.json")


@pytest.fixture
def small_scores(small_config: dict[str, Any], small_family: Family) -> dict[str, np.ndarray]:
    dims, rng = small_family.dims(small_config), np.random.default_rng(3)
    return {
        "ffn.activation": rng.random((dims.layers, dims.ffn)),
        "ffn.output_energy": rng.random((dims.layers, dims.ffn)) ** 4,
        "heads.activation": rng.random((dims.layers, dims.heads)),
        "heads.output_energy": rng.random((dims.layers, dims.heads)),
        "kv_heads.output_energy": rng.random((dims.layers, dims.kv_heads)),
        "hidden.activation": rng.random(dims.hidden),
        "layers.one_by_one": rng.random(dims.layers),
        "layers.block_influence": rng.random(dims.layers),
    }

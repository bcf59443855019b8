"""What a model holds, by component, and what it takes on disk and in the KV cache."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kdscale.eval.sizes import model_sizes


def test_sizes_count_tied_weights_once(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    sizes = model_sizes(model, tiny_llama_dir)
    hidden, ffn, layers, vocab = 96, 128, 4, 320
    attention = layers * (2 * hidden * hidden + 2 * hidden * 32)
    norm = (2 * layers + 1) * hidden
    assert sizes["components"] == {
        "embedding": vocab * hidden, "attention": attention, "ffn": layers * 3 * hidden * ffn, "norm": norm,
        "head": 0, "other": 0,
    }  # fmt: skip
    assert sizes["parameters"] == sum(sizes["components"].values())
    assert sizes["non_embedding_parameters"] == sizes["parameters"] - vocab * hidden
    assert sizes["kv_cache_bytes_per_token"] == 2 * layers * 2 * 16 * 2
    assert sizes["weight_bytes"] == sum(file.stat().st_size for file in tiny_llama_dir.glob("*.safetensors"))
    with torch.no_grad():
        cache = model(input_ids=torch.arange(5)[None], use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held * 2 == 5 * sizes["kv_cache_bytes_per_token"]

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "tie_word_embeddings": True,
}


@pytest.fixture
def raw_safetensors() -> Callable[..., bytes]:
    """Bytes of a safetensors file from a header (object or raw bytes), its payload and, to lie, another length."""

    def make(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + payload

    return make


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Makes folders with a tiny tied Llama in fp32: in `shards` files, with `extra` tensors, with `config` changes."""
    import torch
    from safetensors.torch import save_file

    from kdscale.families import load_family

    def make(shards: int = 1, extra: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        full = {**CONFIG, **config}
        (folder / "config.json").write_text(json.dumps(full))
        generator = torch.Generator().manual_seed(3)
        specs = load_family(full, "config.json").tensors(full)
        tensors = {name: torch.randn(spec.shape, generator=generator) for name, spec in specs.items()} | (extra or {})
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        names = list(tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: tensors[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names[i::shards], file)
        index = {"metadata": {}, "weight_map": {name: weight_map[name] for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make

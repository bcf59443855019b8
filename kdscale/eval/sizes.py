"""How large a model is: parameters, bytes on disk, bytes of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.families import load_family
from kdscale.weights import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARE_OF_FREE_MEMORY = 0.6


def model_sizes(model: PreTrainedModel, path: Path) -> dict[str, Any]:
    """Parameters (tied ones once) by component, bytes of the weight files, 16-bit KV-cache bytes per token."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    vocabulary = {id(p): p.numel() for layer in (embedding, head) if layer is not None for p in layer.parameters()}
    everything = {id(p): p.numel() for p in model.parameters()}
    total, outer = sum(everything.values()), sum(vocabulary.values())
    # the sizes of a quantised model are those of what its weights stand for
    config = read_config(path)
    family = load_family(config, str(path / "config.json"))
    component_of = family.parameter_components(config)
    components = dict.fromkeys(("embedding", "attention", "ffn", "norm", "head", "other"), 0)
    for name, parameter in model.named_parameters():  # a tied weight comes once, as the embedding
        component = component_of.get(name, "other")
        components[component] = components.get(component, 0) + parameter.numel()
    return {
        "parameters": total,
        "embedding_parameters": outer,
        "non_embedding_parameters": total - outer,
        "components": components,
        "weight_bytes": weight_bytes(path),
        "kv_cache_bytes_per_token": 2 * family.cached_numbers(config),
    }


def weight_bytes(path: Path) -> int:
    """Bytes of the weight files of a checkpoint folder, shards included."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def fit_together(models: Mapping[str, Path], dtype: str, device: str) -> bool:
    """Whether all models fit in memory together. A run in fp32 takes twice the bytes of 16-bit weight files."""
    needed = sum(weight_bytes(path) for path in models.values()) * (1 if dtype == "bfloat16" else 2)
    if device == "cuda":
        import torch

        return needed < _SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info()[0]
    import psutil

    return needed < _SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available

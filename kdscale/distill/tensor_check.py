"""Which models tensor-parallel ranks can share, from their config.json alone; found before any work. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdscale.errors import ConfigError
from kdscale.families import Dims, load_family
from kdscale.weights import read_config

# Separate q, k, v, gate and up projections, norms that are replicated or of one head: what tests show to be right.
FAMILIES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")


def check_models(size: int, folders: Mapping[str, Path]) -> None:
    """Raises ConfigError for a model that `size` ranks cannot share. `folders`: by what is in them ("teacher")."""
    if size == 1:
        return
    for what, folder in folders.items():
        config = read_config(folder)
        if config.get("model_type") not in FAMILIES:
            raise ConfigError(
                "distill.tensor_parallel", expected=f"a {what} of one of {', '.join(FAMILIES)}",
                got=str(config.get("model_type")), hint="other families: tensor_parallel: 1, and ZeRO-3 for memory",
            )  # fmt: skip
        check_dims(size, what, load_family(config, str(folder / "config.json")).dims(config))


def check_dims(size: int, what: str, dims: Dims) -> None:
    """Raises ConfigError when there are fewer kv heads, ffn units or tokens than ranks; they need not divide."""
    for name in ("kv_heads", "ffn", "vocab"):
        if getattr(dims, name) < size:
            raise ConfigError(
                "distill.tensor_parallel", expected=f"at most the {what}'s {name}, {getattr(dims, name)}",
                got=str(size), hint="let fewer ranks share a layer",
            )  # fmt: skip

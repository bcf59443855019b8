"""Which models ranks can share by tensor or by sequence, from config.json alone, before any work. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdscale.errors import ConfigError
from kdscale.families import Dims, load_family
from kdscale.weights import read_config

# Separate q, k, v, gate and up projections, norms that are replicated or of one head: what tests show to be right.
FAMILIES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")


def check_tensor_parallel(size: int, folders: Mapping[str, Path]) -> None:
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
        check_tensor_dims(size, what, load_family(config, str(folder / "config.json")).dims(config))


def check_tensor_dims(size: int, what: str, dims: Dims) -> None:
    """Raises ConfigError when there are fewer kv heads, ffn units or tokens than ranks; they need not divide."""
    for name in ("kv_heads", "ffn", "vocab"):
        if getattr(dims, name) < size:
            raise ConfigError(
                "distill.tensor_parallel", expected=f"at most the {what}'s {name}, {getattr(dims, name)}",
                got=str(size), hint="let fewer ranks share a layer",
            )  # fmt: skip


_FIELD = "distill.sequence_parallel"


def check_sequence_parallel(ranks: int, seq_len: int, folders: Mapping[str, Path]) -> None:
    """Raises ConfigError for a length or a model that `ranks` ranks cannot share. `folders`: by what is in them."""
    if ranks == 1:
        return
    if seq_len % ranks:
        raise ConfigError(
            _FIELD, expected=f"a divisor of distill.seq_len ({seq_len})", got=str(ranks), hint="change one of the two"
        )
    for what, folder in folders.items():
        config = read_config(folder)
        if config.get("attn_logit_softcapping"):
            raise ConfigError(
                _FIELD, expected=f"a {what} whose attention has no soft-cap", got=str(config.get("model_type")),
                hint="torch's attention cannot do it: sequence_parallel: 1",
            )  # fmt: skip
        check_sequence_dims(ranks, what, load_family(config, str(folder / "config.json")).dims(config))


def check_sequence_dims(ranks: int, what: str, dims: Dims) -> None:
    """Raises ConfigError when the heads cannot be divided; fewer kv heads than ranks are repeated."""
    if dims.heads % ranks:
        expected = f"a divisor of the {what}'s {dims.heads} query heads"
    elif dims.kv_heads % ranks and ranks % dims.kv_heads:
        expected = f"a divisor or a multiple of the {what}'s {dims.kv_heads} kv heads"
    else:
        return
    raise ConfigError(_FIELD, expected=expected, got=str(ranks), hint="or cut its heads to another number")

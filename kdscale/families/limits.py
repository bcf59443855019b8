"""Numbers of a config.json that no model can have: refused before anything counts up to them or computes with them."""

from __future__ import annotations

import math
from typing import Any

from kdscale.errors import CheckpointError

# No model comes near these: a larger number is damage or malice, and lists of so many tensors would take hours.
LARGEST = {
    "hidden": 1 << 20, "ffn": 1 << 20, "heads": 1 << 14, "kv_heads": 1 << 14, "head_dim": 1 << 14, "layers": 1 << 12,
    "vocab": 1 << 26, "experts": 1 << 14, "dense_ffn": 1 << 20, "shared_ffn": 1 << 20, "ssm_heads": 1 << 14,
    "ssm_head_dim": 1 << 14, "ssm_groups": 1 << 14, "ssm_state": 1 << 14,
}  # fmt: skip
MOST_EXPERTS = 1 << 18  # of all layers together
_UNLIMITED = "time_step_limit."  # a range in Mamba models, whose upper end may be infinite
_POSITIVE = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "rope_theta",
    "max_position_embeddings",
)  # fmt: skip


def check_size(where: str, size: int, limit: int) -> None:
    """Raise CheckpointError for a size of the model beyond `limit`; `where` names its field."""
    if size > limit:
        got = f"{float(size):.3g}" if size < 10**300 else "more than 1e300"
        raise CheckpointError(where, expected=f"at most {limit:,}", got=got)


def check_numbers(value: Any, where: str, field: str = "") -> None:
    """Raise CheckpointError for a number that no model can compute with, at any depth of the config."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_numbers(item, where, f"{field}.{name}" if field else str(name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        unlimited = value == math.inf and field.startswith(_UNLIMITED)
        if isinstance(value, float) and not math.isfinite(value) and not unlimited:
            raise CheckpointError(f"{where}: {field}", expected="a finite number", got=repr(value))
        if field.rpartition(".")[2] in _POSITIVE and value <= 0:
            raise CheckpointError(f"{where}: {field}", expected="a positive number", got=repr(value))

"""Which tensors are the weights of linear maps within layers: what quantised forms of a model round.

Embeddings, head, norms, biases and routers are none of them.
"""

from __future__ import annotations

from kdscale.families.tensor_specs import TensorSpec

# Roles of linear maps → what they read, for all that read the same: its name, and the axis that it is wide.
READS = {
    **dict.fromkeys(("q", "k", "v", "qkv"), ("attention", "hidden")),
    **dict.fromkeys(("gate", "up", "gate_up"), ("mlp", "hidden")),
    "o": ("heads", "heads*head_dim"),
    "down": ("ffn", "ffn"),
}
READ_AXES = tuple(dict.fromkeys(axis for _, axis in READS.values()))


def is_linear_map(spec: TensorSpec) -> bool:
    """Whether a tensor is the weight of a linear map within a layer."""
    return spec.layer is not None and spec.role in READS

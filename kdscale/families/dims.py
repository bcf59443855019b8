"""The sizes of one model, and its parameters counted.

Dimension names: hidden (residual stream), ffn (intermediate; of one expert in a mixture), heads (query heads), kv_heads
(key/value groups), head_dim, layers, vocab, experts (0 in dense models).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from kdscale.families.schema import axis_blocks, block_size

# What a shape is made of; `head_dim` and `vocab` never change in a student.
SHAPE_AXES = ("hidden", "ffn", "heads", "kv_heads", "layers", "experts")  # experts: 0 in dense models


@dataclass(frozen=True)
class Dims:
    """The sizes of one model. `head_dim` and `vocab` never change in a student."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    experts: int = 0

    def replace(self, **sizes: int) -> Dims:
        """The same with other `sizes`."""
        return replace(self, **sizes)

    def axis_size(self, axis: str) -> int:
        """The size of a tensor dimension from its axis: `ffn`, a product `heads*head_dim`, a sum `ffn | ffn`."""
        return sum(block_size(block, asdict(self)) for block in axis_blocks(axis))


@dataclass(frozen=True)
class ParamCount:
    """`embedding` is the embeddings (learned positions too) plus the head (once when tied); `non_embedding` the rest.

    `active` is what one token uses: all of a dense model, and of a mixture only the experts that it is routed to.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int

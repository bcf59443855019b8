"""What memory and time depend on in a model: parameter counts and widths, from a config.json through its family.

Letters: H hidden, F ffn, A heads · head_dim, K kv_heads · head_dim, V vocabulary, L layers, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.families import Family


@dataclass(frozen=True)
class ModelShape:
    """Counts are of parameters. `layer` is the largest layer; `products` what one token is multiplied with."""

    params: int
    layer: int
    products: int
    layers: int
    hidden: int
    ffn: int  # of one expert, times the experts a token is routed to
    heads: int
    head_dim: int
    kv_heads: int
    vocab: int
    tied: bool
    gated: bool
    qk_norm: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], family: Family) -> ModelShape:
        """Exact where the family's file is. Raises CheckpointError for a config the family refuses."""
        dims, count = family.dims(config), family.count_params(config)
        roles = {spec.role for spec in family.layer_tensors(config, 0).values()}
        tables = sum(
            math.prod(spec.shape) for spec in family.outer_tensors(config).values() if spec.component == "embedding"
        )
        tied = bool(family.tied(config))
        return cls(
            params=count.total,
            layer=max(
                sum(math.prod(spec.shape) for spec in family.layer_tensors(config, layer).values())
                for layer in range(dims.layers)
            ),
            # rows of the embedding are looked up, not multiplied; a tied head is the same tensor, multiplied
            products=count.active - tables + (dims.vocab * dims.hidden if tied else 0),
            layers=dims.layers,
            hidden=dims.hidden,
            ffn=dims.ffn * max(1, family.experts_per_token),
            heads=dims.heads,
            head_dim=dims.head_dim,
            kv_heads=dims.kv_heads,
            vocab=dims.vocab,
            tied=tied,
            gated=bool(roles & {"gate", "gate_up"}),
            qk_norm="q_norm" in roles,
        )

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

"""What memory and time depend on in a model: parameter counts and widths, from a config.json through its family.

Letters: H hidden, F ffn, A heads · head_dim, K kv_heads · head_dim, V vocabulary, L layers, S positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.families import Family, load_family
from kdscale.families.schema import axis_size
from kdscale.families.windows import attention_windows
from kdscale.families.writers import layer_writers


@dataclass(frozen=True)
class ModelShape:
    """Counts are of parameters. `layer` is the largest layer.

    `products` are the weights of the matrix products that one token goes through, the output head included: no norms,
    no biases, no looked-up embeddings, and of a mixture only the experts that the token is routed to. `windows`: (how
    far the attention of some layers reaches back, None for all of the document; how many layers these are).
    `linears` are the weights of the layers' linear maps outside experts: what a teacher in 8 bits has in them.
    `last_read`: the width of what a layer's last product gives, where its backward reads that (a norm follows, or each
    expert's share); 0 where it is only added to the hidden states.
    """

    params: int
    layer: int
    products: int
    layers: int
    hidden: int
    ffn: int  # in a mixture of the experts that a token goes to, or of a layer without experts where that is more

    heads: int
    head_dim: int  # the widest, where layers differ
    kv_heads: int
    vocab: int
    tied: bool
    gated: bool
    qk_norm: bool
    windows: tuple[tuple[int | None, int], ...]
    linears: int
    norm: tuple[str, str] = ("rms", "weight")  # kind and gain, as the family's file has them
    norms: int = 2  # over the hidden size, in a layer
    last_read: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], family: Family) -> ModelShape:
        """Exact where the family's file is. Raises CheckpointError for a config the family refuses."""
        dims, count = family.dims(config), family.count_params(config)
        sizes, roles, axes, widths = [], set[str](), set[str](), [dims.head_dim]
        for layer in family.layers_by_kind(config):
            specs = family.layer_tensors(config, layer).values()
            sizes.append(sum(math.prod(spec.shape) for spec in specs))
            roles |= {spec.role for spec in specs}
            axes |= family.layer_axes(config, layer)
            if (attention := layer_writers(family, config, layer).get("o")) is not None:
                widths.append(axis_size(attention.axis, dims.sizes() | family.fixed_sizes) // dims.heads)
        windows = attention_windows(family, config)
        attends = ["kv_heads" in family.layer_axes(config, layer) for layer in range(dims.layers)]
        matrices = [
            spec for spec in family.tensors(config).values() if not spec.counts_as_embedding and len(spec.shape) > 1
        ]
        of_experts = sum(math.prod(spec.shape) for spec in matrices if spec.of_experts)
        used = max(1, family.experts_per_token)
        idle = of_experts // dims.experts * (dims.experts - family.experts_per_token) if of_experts else 0
        return cls(
            params=count.total,
            layer=max(sizes),
            products=sum(math.prod(spec.shape) for spec in matrices) - idle + dims.vocab * dims.hidden,
            layers=dims.layers,
            hidden=dims.hidden,
            ffn=max(dims.ffn * used + dims.shared_ffn, dims.dense_ffn if "dense_ffn" in axes else 0),
            heads=dims.heads,
            head_dim=max(widths),
            kv_heads=dims.kv_heads,
            vocab=dims.vocab,
            tied=bool(family.tied(config)),
            gated=bool(roles & {"gate", "gate_up"}),
            qk_norm="q_norm" in roles,
            linears=sum(math.prod(spec.shape) for spec in matrices if spec.layer is not None and not spec.of_experts),
            windows=tuple(Counter(w for w, there in zip(windows, attends, strict=True) if there).items()),
            norm=(family.data.norm.kind, family.data.norm.gain),
            norms=len(roles & {"attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"}),
            last_read=dims.hidden * used if of_experts or "ffn_post_norm" in roles else 0,
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
        """The same, whichever family the config is of; `where` is for messages."""
        return cls.of(config, load_family(dict(config), where))

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocab * self.hidden

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

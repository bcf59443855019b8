"""What a family file says about GGUF files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdscale.families.schema.axes import Name, Strict
from kdscale.families.schema.config_fields import Requirement
from kdscale.families.schema.tensors import Role


class QueryScale(Strict):
    """The config field whose inverse square root scales queries (Gemma's `query_pre_attn_scalar`).

    llama.cpp takes 1 / sqrt(head_dim), and 1 / sqrt(hidden // heads) in a model of `hidden_over_heads_at` layers.
    """

    field: Name
    hidden_over_heads_at: int


class Gguf(Strict):
    """How llama.cpp reads a model of the family out of a GGUF file; its tensors' names follow from their roles.

    `rotary`: whether the two numbers that are rotated together lie side by side in a head (`pairs`), or half a head
    apart as in transformers. `numbers`: metadata key, without the architecture → field of the config (its default where
    config.json has none). `requires`: what llama.cpp computes and no metadata changes. `unread`: roles that it has no
    place for. `windows`: it takes sliding windows that repeat with a period. `square_attention`: heads * head_dim must
    be hidden. `partial_rotary`: it can rotate a part of each head. `no_rope_every`: it rotates nothing in every n-th
    layer.
    """

    architecture: Name
    rotary: Literal["pairs", "halves"] = "halves"
    numbers: dict[Name, Name]
    rope_scaling: tuple[Literal["linear", "yarn", "llama3", "longrope"], ...] = Field(strict=False, default=())
    requires: tuple[Requirement, ...] = Field(strict=False, default=())
    unread: tuple[Role, ...] = Field(strict=False, default=())
    windows: bool = False
    square_attention: bool = False
    partial_rotary: bool = False
    no_rope_every: int | None = None
    query_scale: QueryScale | None = None

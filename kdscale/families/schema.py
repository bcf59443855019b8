"""The shape of a family file: what `kdscale/families/*.json` may say, checked strictly.

A family file describes the tensors of one transformers architecture as they are on disk: a name template and one
named axis a dimension. Nothing here imports torch, so that planning starts in a moment.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DimName = Literal["hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "vocab"]
# What one tensor dimension counts; products for the projections that hold all heads side by side.
Axis = Literal["hidden", "ffn", "heads*head_dim", "kv_heads*head_dim", "vocab", "head_dim"]
Role = Literal[
    "embed",
    "attn_norm",
    "q",
    "q_bias",
    "q_norm",
    "k",
    "k_bias",
    "k_norm",
    "v",
    "v_bias",
    "o",
    "o_bias",
    "ffn_norm",
    "gate",
    "gate_bias",
    "up",
    "up_bias",
    "down",
    "down_bias",
    "final_norm",
    "head",
]
LAYER = "{layer}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DimField(_Strict):
    """Where a dimension is in config.json, and what transformers takes when it is absent or null.

    `None` means that there is no fallback: a config without the field is refused.
    """

    field: str = Field(min_length=1)
    absent: int | Literal["heads", "hidden // heads"] | None = None
    null: Literal["heads", "hidden // heads"] | None = None


class FlagField(_Strict):
    """A boolean of config.json that decides whether some tensors exist."""

    field: str = Field(min_length=1)
    absent: bool


class Divides(_Strict):
    """`by` divides `dim`, or transformers refuses the config."""

    dim: DimName
    by: DimName
    why: str = Field(min_length=1)


class LayerBoundary(_Strict):
    """A config field that splits the layers in two: those before it and those from it on."""

    field: str = Field(min_length=1)
    absent: int


class TensorTemplate(_Strict):
    name: str = Field(min_length=1)
    axes: tuple[Axis, ...] = Field(strict=False, min_length=1)
    role: Role
    when: str | None = None  # only if this flag is true
    unless: str | None = None  # only if this flag is false

    @property
    def per_layer(self) -> bool:
        return LAYER in self.name


class Tie(_Strict):
    """`tensor` is the same storage as `to` when the flag is true, and then absent on disk."""

    tensor: str
    to: str
    when: str


class Sites(_Strict):
    """Module paths inside the transformers model: where importance is read and where the residual stream goes.

    `embed`, `layers`, `final_norm`, `rotary` and `head` start at the causal LM; the rest are relative to one layer.
    """

    embed: str
    layers: str
    final_norm: str
    rotary: str
    head: str
    ffn: str  # its input is what the ffn axis is ranked by, shape [batch, seq, ffn]
    heads: str  # its input is what heads and kv groups are ranked by, shape [batch, seq, heads * head_dim]
    attention: str
    mlp: str
    norms: tuple[str, ...] = Field(strict=False, min_length=1)  # their outputs rank the hidden axis


class FamilyData(_Strict):
    """One family file, cross-checked: every flag, tie and role that is referred to exists."""

    name: str = Field(min_length=1)
    model_types: tuple[str, ...] = Field(strict=False, min_length=1)
    architectures: tuple[str, ...] = Field(strict=False, min_length=1)
    dims: dict[DimName, DimField]
    flags: dict[str, FlagField]
    constraints: tuple[Divides, ...] = Field(strict=False)
    layer_lists: tuple[str, ...] = Field(strict=False)  # config lists with one entry a layer
    layer_boundaries: tuple[LayerBoundary, ...] = Field(strict=False)
    tensors: tuple[TensorTemplate, ...] = Field(strict=False, min_length=1)
    ties: tuple[Tie, ...] = Field(strict=False)
    ignored: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        strict=False
    )  # globs of buffers of old checkpoints
    sites: Sites

    @model_validator(mode="after")
    def _references_exist(self) -> FamilyData:
        missing = sorted(set(DimName.__args__) - set(self.dims))  # type: ignore[attr-defined]
        if missing:
            raise ValueError(f"dims lacks {', '.join(missing)}")
        for what, values in (("name", [t.name for t in self.tensors]), ("role", [t.role for t in self.tensors])):
            twice = sorted(value for value, count in Counter(values).items() if count > 1)
            if twice:
                raise ValueError(f"tensors repeat the {what} {', '.join(twice)}")
        flags = {flag for t in self.tensors for flag in (t.when, t.unless) if flag} | {tie.when for tie in self.ties}
        if flags != set(self.flags):
            raise ValueError(f"flags are {sorted(self.flags)} but the tensors and ties use {sorted(flags)}")
        names = {t.name for t in self.tensors}
        for tie in self.ties:
            if not {tie.tensor, tie.to} <= names:
                raise ValueError(f"tie of {tie.tensor} to {tie.to} names a tensor that is not in tensors")
        return self

"""The schema of a family file (`kdscale/families/*.json`), checked strictly.

A family file describes the tensors of one transformers architecture as they are on disk: a name template and one
named axis per dimension. Nothing here imports torch, so that planning starts in a moment.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

DimName = Literal["hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "vocab", "experts"]
DIMS: tuple[str, ...] = DimName.__args__  # type: ignore[attr-defined]
# The role of a tensor names it within a layer or outside the layers; its component is the part of the model it is in.
Component = Literal["embedding", "attention", "ffn", "norm", "head"]
_NORMS = ("embed_norm", "attn_norm", "q_norm", "k_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm", "final_norm")
_ROLES_OF: dict[Component, tuple[str, ...]] = {
    "embedding": ("embed", "position_embed"),
    "attention": ("q", "q_bias", "k", "k_bias", "v", "v_bias", "qkv", "qkv_bias", "o", "o_bias"),
    "ffn": ("gate", "gate_bias", "up", "up_bias", "gate_up", "gate_up_bias", "down", "down_bias", "router"),
    "norm": (*_NORMS, *(f"{norm}_bias" for norm in _NORMS if norm not in ("q_norm", "k_norm"))),
    "head": ("head", "head_bias"),
}
COMPONENT_OF: dict[str, Component] = {role: component for component, roles in _ROLES_OF.items() for role in roles}
LAYER, EXPERT = "{layer}", "{expert}"
_FACTOR = re.compile(r"[a-z_]+|[1-9][0-9]*")
_EXPRESSION = re.compile(
    r"(?P<dim>[a-z_]+)|(?P<top>[a-z_]+) // (?P<by>[a-z_]+)|(?P<times>[1-9][0-9]*) \* (?P<of>[a-z_]+)"
)

# An axis is a sequence of blocks; a block is a row-major product of dimensions and plain numbers.
Blocks = tuple[tuple[str | int, ...], ...]


@cache
def axis_blocks(axis: str) -> Blocks:
    """Parse `heads*head_dim | kv_heads` into (("heads", "head_dim"), ("kv_heads",)). Raises ValueError."""
    blocks = []
    for block in axis.split("|"):
        factors = [factor.strip() for factor in block.split("*")]
        if wrong := [factor for factor in factors if not _FACTOR.fullmatch(factor)]:
            raise ValueError(f"axis {axis!r}: {wrong[0]!r} is neither a dimension nor a positive number")
        blocks.append(tuple(int(factor) if factor.isdigit() else factor for factor in factors))
    return tuple(blocks)


def block_size(block: tuple[str | int, ...], sizes: Mapping[str, int]) -> int:
    """The product that a block stands for, with the sizes of its dimensions."""
    return math.prod(factor if isinstance(factor, int) else sizes[factor] for factor in block)


def _axis(text: str) -> str:
    axis_blocks(text)
    return text


def _role(text: str) -> str:
    if text not in COMPONENT_OF:
        raise ValueError(f"no such role; roles are {', '.join(COMPONENT_OF)}")
    return text


def _expression(text: str) -> str:
    match = _EXPRESSION.fullmatch(text)
    names = [match[group] for group in ("dim", "top", "by", "of") if match[group]] if match else []
    if not names or set(names) - {"hidden", "heads"}:
        raise ValueError(f"{text!r} is not of the form 'heads', 'hidden // heads' or '4 * hidden'")
    return text


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Compute a size from `hidden` and `heads`, e.g. `hidden // heads`."""
    match = _EXPRESSION.fullmatch(expression)
    assert match
    if match["dim"]:
        return sizes[match["dim"]]
    return sizes[match["top"]] // sizes[match["by"]] if match["top"] else int(match["times"]) * sizes[match["of"]]


Axis = Annotated[str, AfterValidator(_axis)]
Role = Annotated[str, AfterValidator(_role)]
Expression = Annotated[str, AfterValidator(_expression)]
Name = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DimField(_Strict):
    """Where a dimension is in config.json, and what transformers takes when it is absent or null.

    Without a fallback a config without the field is refused. `always` replaces `field` where transformers has no field
    and always takes this; sizes that break the equation are then no model of the family.
    """

    field: Name | None = None
    aliases: tuple[Name, ...] = Field(strict=False, default=())  # other names of the field
    absent: int | Expression | None = None
    null: Expression | None = None
    always: Expression | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DimField:
        if (self.field is None) == (self.always is None):
            raise ValueError("needs either field or always")
        return self

    def name_in(self, config: Mapping[str, Any]) -> str:
        """The field's name in this config (its first name when it has none of them)."""
        assert self.field is not None
        return next((name for name in (self.field, *self.aliases) if name in config), self.field)


class SizeField(_Strict):
    """A size that some tensors have and that never changes in a student (positions of a learned embedding)."""

    field: Name
    absent: int


class FlagField(_Strict):
    """A boolean of config.json that decides whether some tensors exist."""

    field: Name
    absent: bool


class Constraint(_Strict):
    """`by` divides `dim`, or `dim` equals the product `equals`; else transformers refuses the config.

    `when_present`: dotted config fields; the constraint holds only for configs that have one of them.
    """

    dim: DimName
    by: DimName | None = None
    equals: Axis | None = None
    when_present: tuple[Name, ...] = Field(strict=False, default=())
    why: Name

    @model_validator(mode="after")
    def _one_rule(self) -> Constraint:
        if (self.by is None) == (self.equals is None):
            raise ValueError("needs either by or equals")
        return self


class Requirement(_Strict):
    """A config field whose other values make a model that this file does not describe. Absent is fine."""

    field: Name
    one_of: tuple[Any, ...] = Field(strict=False, min_length=1)
    why: Name


class Pattern(_Strict):
    """The list that an absent field stands for: `last` in every n-th layer, `others` in the other layers."""

    every: Annotated[int, Field(ge=1)]
    every_field: Name | None = None  # config field that overrides `every`
    last: str | int
    others: str | int


class LayerList(_Strict):
    """A config list with one entry per layer. Without `absent` there is nothing to cut when the field is absent.

    `said_too` are fields that give the interval of the list a second time, for older readers.
    """

    field: Name
    absent: Pattern | None = None
    said_too: tuple[Name, ...] = Field(strict=False, default=())


class LayerBoundary(_Strict):
    """A config field that splits the layers in two: those before it and those from it on."""

    field: Name
    absent: int


class Window(_Strict):
    """Sliding windows: in the layers that slide a query sees `field` positions, itself included (null: all of them).

    `only_with`: a boolean field without which no layer slides. `layers`: the layer list whose "sliding_attention"
    entries slide; where it is absent, the layers from the layer boundary on. Without it all layers slide.
    """

    field: Name = "sliding_window"
    absent: int | None = None
    only_with: Name | None = None
    layers: Name | None = None


class Norm(_Strict):
    """What the norms over `hidden` compute: centred (`layer`) or not (`rms`); times w, or times 1 + w (Gemma)."""

    kind: Literal["rms", "layer"] = "rms"
    gain: Literal["weight", "one_plus_weight"] = "weight"

    @property
    def added(self) -> float:
        """What the norm adds to its weight on disk before it multiplies by it."""
        return 1.0 if self.gain == "one_plus_weight" else 0.0


class QueryScale(_Strict):
    """The config field whose inverse square root scales queries (Gemma's `query_pre_attn_scalar`).

    llama.cpp takes 1 / sqrt(head_dim), and 1 / sqrt(hidden // heads) in a model of `hidden_over_heads_at` layers.
    """

    field: Name
    hidden_over_heads_at: int


class Gguf(_Strict):
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


class TensorTemplate(_Strict):
    """One tensor of the checkpoint, or one per layer (`{layer}`), or one per layer and expert (`{expert}`).

    `loads_as` is the parameter's name in the transformers model where that differs: tensors of the same parameter are
    joined along the first dimension in the order of the family file, and those of the experts then stacked.
    """

    name: Name
    axes: tuple[Axis, ...] = Field(strict=False, min_length=1)
    role: Role
    when: str | None = None  # only if this flag is true
    unless: str | None = None  # only if this flag is false
    loads_as: Name | None = None

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return LAYER in self.name

    @property
    def per_expert(self) -> bool:
        """Whether each expert of each layer has one."""
        return EXPERT in self.name


class Tie(_Strict):
    """`tensor` is the same storage as `to` when the flag is true, and then absent on disk."""

    tensor: str
    to: str
    when: str


class Drop(_Strict):
    """Tensors that belong to the model but not to the student (heads that predict several tokens ahead)."""

    tensors: Name  # glob
    what: Name  # its name in the notice to the user
    config: dict[str, int | bool | None] = Field(default={})  # fields of the student's config that say they are gone


class Sites(_Strict):
    """Module paths inside the transformers model: where importance is read and where the residual stream goes.

    `embed`, `layers`, `final_norm`, `rotary` and `head` start at the causal LM; the rest are relative to one layer.
    A family has either `ffn`, or `experts` and `router`.
    """

    embed: str
    layers: str
    final_norm: str
    rotary: str = ""  # empty: positions are learned
    head: str
    ffn: str = ""  # its input is what the ffn axis is ranked by, shape [batch, seq, ffn]
    experts: str = ""  # called with hidden states, chosen experts and routing weights
    router: str = ""
    heads: str  # its input is what heads and kv groups are ranked by, shape [batch, seq, heads * head_dim]
    attention: str
    mlp: str
    norms: tuple[str, ...] = Field(strict=False, min_length=1)  # their outputs rank the hidden axis

    @model_validator(mode="after")
    def _one_mlp(self) -> Sites:
        if not bool(self.ffn) == (not self.experts) == (not self.router):
            raise ValueError("needs either ffn, or experts and router")
        return self

    @property
    def mlp_output(self) -> str:
        """The module whose output the feed-forward sublayer adds to the residual stream, before any post-norm."""
        return self.ffn or self.experts


class FamilyData(_Strict):
    """One family file, with every reference to a flag, tensor, size or role checked."""

    name: Name
    model_types: tuple[Name, ...] = Field(strict=False, min_length=1)
    architectures: tuple[Name, ...] = Field(strict=False, min_length=1)
    dims: dict[DimName, DimField]
    sizes: dict[Name, SizeField] = Field(default={})
    experts_per_token: DimField | None = None
    flags: dict[str, FlagField]
    requires: tuple[Requirement, ...] = Field(strict=False, default=())
    constraints: tuple[Constraint, ...] = Field(strict=False)
    layer_lists: tuple[LayerList, ...] = Field(strict=False)
    layer_boundaries: tuple[LayerBoundary, ...] = Field(strict=False)
    window: Window | None = None  # without it attention reaches back to the document's first token
    norm: Norm = Norm()
    # what the model multiplies its embeddings by, where that follows from the config's sizes and changes with them
    embed_multiplier: Literal["sqrt_hidden"] | None = None
    gguf: Gguf | None = None  # without it no GGUF file is written
    optional_prefix: Name | None = None  # that checkpoints saved from the base model lack
    tensors: tuple[TensorTemplate, ...] = Field(strict=False, min_length=1)
    ties: tuple[Tie, ...] = Field(strict=False)
    drops: tuple[Drop, ...] = Field(strict=False, default=())
    ignored: tuple[Name, ...] = Field(strict=False)  # globs of buffers of old checkpoints
    sites: Sites

    @model_validator(mode="after")
    def _references_exist(self) -> FamilyData:
        missing = sorted(set(DIMS) - {"experts"} - set(self.dims))
        if missing:
            raise ValueError(f"dims lacks {', '.join(missing)}")
        for what, values in (("name", [t.name for t in self.tensors]), ("role", [t.role for t in self.tensors])):
            twice = sorted(value for value, count in Counter(values).items() if count > 1)
            if twice:
                raise ValueError(f"tensors repeat the {what} {', '.join(twice)}")
        flags = {flag for t in self.tensors for flag in (t.when, t.unless) if flag} | {tie.when for tie in self.ties}
        if flags != set(self.flags):
            raise ValueError(f"flags are {sorted(self.flags)} but the tensors and ties use {sorted(flags)}")
        if self.window and self.window.layers not in {None, *(entry.field for entry in self.layer_lists)}:
            raise ValueError(f"window.layers: {self.window.layers} is not in layer_lists")
        names = {t.name for t in self.tensors}
        for tie in self.ties:
            if not {tie.tensor, tie.to} <= names:
                raise ValueError(f"tie of {tie.tensor} to {tie.to} names a tensor that is not in tensors")
        return self

    @model_validator(mode="after")
    def _axes_are_known(self) -> FamilyData:
        if set(self.sizes) & set(DIMS):
            raise ValueError("sizes may not repeat a dimension")
        known = {*self.dims, *self.sizes}
        axes = [axis for t in self.tensors for axis in t.axes] + [c.equals for c in self.constraints if c.equals]
        for axis in axes:
            unknown = [f for block in axis_blocks(axis) for f in block if isinstance(f, str) and f not in known]
            if unknown:
                raise ValueError(f"axes: {axis!r} uses {unknown[0]!r}, which is neither in dims nor in sizes")
        unused = set(self.sizes) - {f for axis in axes for block in axis_blocks(axis) for f in block}
        if unused:
            raise ValueError(f"sizes {sorted(unused)} are not used by any tensor")
        return self

    @model_validator(mode="after")
    def _experts_agree(self) -> FamilyData:
        given = {
            "dims.experts": "experts" in self.dims,
            "experts_per_token": self.experts_per_token is not None,
            "a tensor of each {expert}": any(t.per_expert for t in self.tensors),
            "sites.experts": bool(self.sites.experts),
        }
        if len(set(given.values())) > 1:
            lacks = ", ".join(what for what, is_given in given.items() if not is_given)
            raise ValueError(f"a mixture of experts needs all of {', '.join(given)}; this file lacks {lacks}")
        return self

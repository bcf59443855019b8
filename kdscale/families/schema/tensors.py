"""What a family file says about tensors: their names, axes and roles, and the modules that compute with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from kdscale.families.schema.axes import Axis, DimName, Name, Strict

# The role of a tensor names it within a layer or outside the layers; its component is the part of the model it is in.
Component = Literal["embedding", "attention", "mixer", "ffn", "norm", "head"]
# Latent attention: projections to a small width and from there to all heads, for queries, and for keys and values.
_MLA = ("q_a", "q_a_bias", "q_b", "kv_a", "kv_a_bias", "kv_b")
_MAPS = ("gate", "up", "gate_up", "down", "shared_gate", "shared_up", "shared_gate_up", "shared_down")
_NORMS_WITHOUT_BIAS = ("q_norm", "k_norm", "q_a_norm", "kv_a_norm", "ssm_norm")
_NORMS = (
    "embed_norm", "attn_norm", *_NORMS_WITHOUT_BIAS, "attn_post_norm", "ffn_norm", "ffn_post_norm", "final_norm",
    "layer_inputs_norm", "layer_input_post_norm",
    "experts_norm", "experts_post_norm", "shared_post_norm",  # of experts beside an MLP, each with norms of its own
    "attn_sum_norm", "ffn_sum_norm",  # of the stream itself, once a sublayer's output was added to it (BERT)
)  # fmt: skip
_ROLES_OF: dict[Component, tuple[str, ...]] = {
    "embedding": ("embed", "position_embed", "type_embed", "layer_embed"),
    "attention": ("q", "q_bias", "k", "k_bias", "v", "v_bias", "qkv", "qkv_bias", "o", "o_bias", "sinks", *_MLA),
    # of Mamba 2 and gated delta nets: what enters, the convolution over it, decay, step, skip, and what leaves
    "mixer": (
        "ssm_in", "ssm_in_bias", "ssm_gate", "ssm_beta", "ssm_decay", "ssm_conv", "ssm_conv_bias", "ssm_a", "ssm_d",
        "ssm_dt", "ssm_out", "ssm_out_bias",
        # of a short convolution, which is as wide as the stream and loses the same channels
        "conv_in", "conv_in_bias", "conv", "conv_bias", "conv_out", "conv_out_bias",
    ),
    "ffn": (
        *(f"{part}{kind}" for part in _MAPS for kind in ("", "_bias")),
        # `router…`: one number an expert; the other scales what the router reads
        *("router", "router_bias", "router_correction", "router_scale", "routing_scale"),
        "latent_in", "latent_out",  # around experts that read and write a latent
        "shared_share",  # how much of the expert that every token goes to is added
        # of an input that each layer has of its own: the map from the embedding to those of all layers (beside
        # `layer_embed`), and in a layer what of the stream it is multiplied by, and what writes the product
        *("layer_inputs", "layer_input_gate", "layer_input_out"),
        "layer_scale",  # what a layer multiplies all that it puts out by, its input too
        *(f"act_{constant}" for constant in ("alpha_p", "alpha_n", "beta", "eps")),  # of an activation that has weights
    ),
    "norm": (*_NORMS, *(f"{norm}_bias" for norm in _NORMS if norm not in _NORMS_WITHOUT_BIAS)),
    # pooler: beside an encoder without a head; transform: between an encoder and its head
    "head": (
        "head", "head_bias", "pooler", "pooler_bias", "transform", "transform_bias", "transform_norm",
        "transform_norm_bias",
    ),
}  # fmt: skip
COMPONENT_OF: dict[str, Component] = {role: component for component, roles in _ROLES_OF.items() for role in roles}
LAYER, EXPERT, LAYERS = "{layer}", "{expert}", "{layers}"


def _role(text: str) -> str:
    if text not in COMPONENT_OF:
        raise ValueError(f"no such role; roles are {', '.join(COMPONENT_OF)}")
    return text


Role = Annotated[str, AfterValidator(_role)]


class TensorTemplate(Strict):
    """One tensor of the checkpoint, or one per layer (`{layer}`), or one per layer and expert (`{expert}`).

    `loads_as` is the parameter's name in the transformers model where that differs: tensors of the same parameter are
    joined along the first dimension in the order of the family file, and those of the experts then stacked.
    A `buffer` is a number or table that is stored but never trained, and not counted; it alone may have no axes.
    """

    name: Name
    axes: tuple[Axis, ...] = Field(strict=False)
    role: Role
    buffer: bool = False
    when: str | None = None  # only if this flag is true
    unless: str | None = None  # only if this flag is false
    # only in layers of one of these kinds, which `layer_kinds` gives; empty: in all layers
    only_in: tuple[Name, ...] = Field(strict=False, default=())
    not_in: tuple[Name, ...] = Field(strict=False, default=())  # in no layers of these kinds
    loads_as: Name | None = None
    architectures: tuple[Name, ...] = Field(strict=False, default=())  # those that have it; empty: all of the family

    @model_validator(mode="after")
    def _has_axes(self) -> TensorTemplate:
        if not self.axes and not self.buffer:
            raise ValueError("axes may be empty in a buffer only")
        return self

    def excludes(self, other: TensorTemplate) -> bool:
        """Whether a flag decides which of the two there is."""
        pairs = ((self.when, other.unless), (self.unless, other.when))
        return any(flag is not None and flag == unless for flag, unless in pairs)

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return LAYER in self.name

    @property
    def per_expert(self) -> bool:
        """Whether each expert of each layer has one."""
        return EXPERT in self.name

    @property
    def stacked(self) -> bool:
        """Whether it holds those of all experts of a layer, one after the other."""
        return self.axes[:1] == ("experts",) and not self.role.startswith("router")


class Norm(Strict):
    """What the norms over `hidden` compute: centred (`layer`) or not (`rms`); times w, or times 1 + w (Gemma)."""

    kind: Literal["rms", "layer"] = "rms"
    gain: Literal["weight", "one_plus_weight"] = "weight"

    @property
    def added(self) -> float:
        """What the norm adds to its weight on disk before it multiplies by it."""
        return 1.0 if self.gain == "one_plus_weight" else 0.0


class Tie(Strict):
    """`tensor` is the same storage as `to` when the flag is true, and then absent on disk."""

    tensor: str
    to: str
    when: str


class Drop(Strict):
    """Tensors that belong to the model but not to the student (heads that predict several tokens ahead).

    `kept_with`: the axes that may be cut while they are kept, where the config asks for that; without it none ever is.
    """

    tensors: Name  # glob; `{layers}` stands for the number of layers, which a layer behind the last one has
    what: Name  # its name in the notice to the user
    config: dict[str, int | bool | None] = Field(default={})  # fields of the student's config that say they are gone
    kept_with: tuple[DimName, ...] = Field(strict=False, default=())

    def glob(self, layers: Callable[[], int]) -> str:
        """The glob in a model of so many `layers`, which are asked for where it needs them."""
        return self.tensors.replace(LAYERS, str(layers())) if LAYERS in self.tensors else self.tensors


class ClassHead(Strict):
    """Of an encoder: what stands on the architecture that tells classes, as `head` and `transform` of Sites.

    `pooling`: the config field that says what of a text's hidden states goes through it, `cls` (its first one) or
    `mean`; without one the first.
    """

    head: Name
    transform: tuple[str, ...] = Field(strict=False, default=())
    pooling: Name | None = None


class LayerSites(Strict):
    """Module paths inside one layer. Either `ffn`, or `experts` and `router`, and then perhaps `shared`."""

    ffn: str = ""  # its input is what the ffn axis is ranked by, shape [batch, seq, ffn]
    experts: str = ""  # called with hidden states, chosen experts and routing weights
    router: str = ""
    # of a router that reads the stream itself, and not what the experts read: its norm, which has no gain and is
    # followed by a division by √hidden
    router_norm: str = ""
    layer_input: str = ""  # the last projection of an input that each layer has of its own
    latent: str = ""  # of experts that write to a latent: the projection from there to the stream
    shared: str = ""  # the last projection of the expert that every token goes to
    heads: str = ""  # its input is what heads and kv groups are ranked by, shape [batch, seq, heads * head_dim]
    ssm: str = ""  # its input is what ssm heads are ranked by, shape [batch, seq, ssm_heads * ssm_head_dim]
    # of a mixer that multiplies what its first projection puts out by a constant vector: that buffer
    ssm_scale: str = ""
    conv: str = ""  # the last projection of a short convolution
    attention: str = ""
    mlp: str = ""
    norms: tuple[str, ...] = Field(strict=False, default=())  # their outputs rank the hidden axis

    @property
    def router_reads_more(self) -> bool:
        """Whether the router reads something else than the experts do."""
        return bool(self.router_norm or self.latent)


class Sites(LayerSites):
    """Module paths inside the transformers model: where importance is read and where the residual stream goes.

    `embed`, `layers`, `final_norm`, `rotary`, `head`, `transform` and `pooler` start at the whole model; the rest are
    relative to one layer.
    """

    embed: str
    layers: str
    final_norm: str = ""  # empty: the last layer ends with a norm (BERT)
    rotary: str = ""  # empty: positions are learned
    head: str = ""
    # of an encoder: what its hidden states go through before the head, in order: modules, or the name of a function
    # (`gelu`, `relu`, `tanh`)
    transform: tuple[str, ...] = Field(strict=False, default=())
    pooler: str = ""  # of an encoder: what its first position goes through beside its hidden states

    def of_kinds(self, kinds: Iterable[LayerSites]) -> Sites:
        """These sites with what layers of some kinds have besides, or instead. Raises ValueError for two MLPs."""
        said = [of_kind.model_dump(exclude_unset=True) for of_kind in kinds]
        sites = self.model_copy(update={name: value for each in said for name, value in each.items()})
        if bool(sites.experts) != bool(sites.router) or (sites.ffn and sites.experts):
            raise ValueError("sites: either ffn, or experts and router, or none of them")
        return sites

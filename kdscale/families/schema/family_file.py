"""A family file as a whole (`kdscale/families/*.json`), with every reference in it checked."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from kdscale.families.schema.axes import (
    DIMS,
    OPTIONAL_DIMS,
    SSM_DIMS,
    Axis,
    DimName,
    Name,
    Strict,
    axis_blocks,
    axis_groups,
    expression_names,
)
from kdscale.families.schema.config_fields import (
    Chosen,
    Constraint,
    DimField,
    ExpertGroups,
    FlagField,
    LayerBoundary,
    LayerList,
    ProductField,
    Requirement,
    SizeField,
    Window,
)
from kdscale.families.schema.gguf import Gguf
from kdscale.families.schema.layer_kinds import LayerKinds
from kdscale.families.schema.tensors import ClassHead, Drop, LayerSites, Norm, Sites, TensorTemplate, Tie

HeadKind = Literal["masked_lm", "none", "classes"]


class FamilyData(Strict):
    """One family file, with every reference to a flag, tensor, size or role checked."""

    name: Name
    model_types: tuple[Name, ...] = Field(strict=False, min_length=1)
    architectures: tuple[Name, ...] = Field(strict=False, min_length=1)
    chosen: Chosen | None = None  # which configs it is about, where another file has the same model type
    # of encoders, whose positions see those after them too: what stands on each architecture; empty: a causal LM
    heads: dict[Name, HeadKind] = Field(default={})
    class_head: ClassHead | None = None  # of encoders with an architecture that tells classes
    dims: dict[DimName, DimField]
    uncut: dict[DimName, Name] = Field(default={})  # axes that no student has fewer of, and why
    sizes: dict[Name, SizeField] = Field(default={})
    products: tuple[ProductField, ...] = Field(strict=False, default=())
    experts_per_token: DimField | None = None
    expert_groups: ExpertGroups | None = None
    experts_weigh: Literal["output", "input"] = "output"  # what of an expert is multiplied by its weight for a token
    flags: dict[str, FlagField]
    requires: tuple[Requirement, ...] = Field(strict=False, default=())
    constraints: tuple[Constraint, ...] = Field(strict=False)
    layer_lists: tuple[LayerList, ...] = Field(strict=False)
    layer_boundaries: tuple[LayerBoundary, ...] = Field(strict=False)
    layer_overrides: Name | None = None  # config field: what some layers have otherwise, by their numbers
    layer_kinds: tuple[LayerKinds, ...] = Field(strict=False, default=())  # without it all layers are of one kind
    window: Window | None = None  # without it attention reaches back to the document's first token
    norm: Norm = Norm()
    cached: Axis = "2*kv_heads*head_dim"  # numbers of a token that a layer keeps for those after it
    cached_in: dict[Name, Axis | None] = Field(default={})  # the same in layers of a kind that keeps others, or none
    # the kind of layers that read the keys and values of the last layer before them which is not of this kind, and of
    # the same kinds otherwise
    shared_keys_in: Name | None = None
    # one of `sizes`: how wide the input is that each layer has of its own, given to it behind the stream
    layer_inputs: Name | None = None
    # what the model multiplies its embeddings by, where that follows from the config's sizes and changes with them
    embed_multiplier: Literal["sqrt_hidden"] | None = None
    gguf: Gguf | None = None  # without it no GGUF file is written
    # of names, which checkpoints saved from the base model lack, and so does an architecture without a head
    optional_prefix: Name | None = None
    old_names: dict[Name, Name] = Field(default={})  # ends of names in old checkpoints → today's
    tensors: tuple[TensorTemplate, ...] = Field(strict=False, min_length=1)
    ties: tuple[Tie, ...] = Field(strict=False)
    drops: tuple[Drop, ...] = Field(strict=False, default=())
    ignored: tuple[Name, ...] = Field(strict=False)  # globs of buffers of old checkpoints
    sites: Sites
    sites_in: dict[Name, LayerSites] = Field(default={})  # what layers of a kind have besides, or instead

    def exists_in(self, template: TensorTemplate, kinds: Collection[str]) -> bool:
        """Whether layers of these kinds have such a tensor."""
        here = not template.only_in or bool(set(template.only_in) & set(kinds))
        return here and not set(template.not_in) & set(kinds)

    def sites_of(self, kinds: Collection[str]) -> Sites:
        """The sites of a layer of these kinds."""
        return self.sites.of_kinds(sites for kind, sites in self.sites_in.items() if kind in kinds)

    def cached_of(self, kinds: Collection[str]) -> str | None:
        """The axis of the numbers of a token that a layer of these kinds keeps; None where it keeps none."""
        return next((axis for kind, axis in self.cached_in.items() if kind in kinds), self.cached)

    @model_validator(mode="after")
    def _kinds_agree(self) -> FamilyData:
        known = [name for rule in self.layer_kinds for name in rule.names]
        used = {*self.sites_in, *self.cached_in, *(kind for t in self.tensors for kind in (*t.only_in, *t.not_in))}
        used |= {self.shared_keys_in} if self.shared_keys_in else set()
        if len(set(known)) < len(known) or used - set(known):
            raise ValueError(f"layer_kinds gives {known} but tensors, sites_in and others use {sorted(used)}")
        listed = {rule.field for rule in self.layer_kinds if rule.field is not None}
        if self.chosen is not None and self.chosen.entry is not None:
            listed.add(self.chosen.field)
        if missing := listed - {entry.field for entry in self.layer_lists}:
            raise ValueError(f"layer_kinds, chosen: {', '.join(missing)} is not in layer_lists")
        of_layer = itertools.product(*(rule.names for rule in self.layer_kinds))
        for kinds, name in itertools.product(of_layer, self.architectures):
            sites = self.sites_of(kinds)
            there = [t for t in self.tensors if self.exists_in(t, kinds) and name in (t.architectures or (name,))]
            for role, needs, given in (
                ("down", "either ffn, or experts and router", sites.ffn or sites.experts), ("o", "heads", sites.heads),
                ("ssm_out", "ssm", sites.ssm), ("conv_out", "conv", sites.conv),
                ("latent_out", "latent", sites.latent), ("layer_input_out", "layer_input", sites.layer_input),
            ):  # fmt: skip
                if any(t.role == role for t in there) and not given:
                    raise ValueError(f"sites: a layer with the role {role} needs {needs}")
            for one, two in itertools.combinations(there, 2):
                if one.excludes(two):
                    continue
                if twice := [what for what in ("name", "role") if getattr(one, what) == getattr(two, what)]:
                    raise ValueError(f"tensors repeat the {twice[0]} {getattr(one, twice[0])}")
        return self

    @property
    def is_encoder(self) -> bool:
        """Whether its models read a text from both sides."""
        return bool(self.heads)

    @property
    def first_layer_differs(self) -> bool:
        """Whether a model's first layer is of a kind of its own: no other layer can stand in its place."""
        return any(rule.first for rule in self.layer_kinds)

    def architecture_in(self, config: Mapping[str, Any]) -> str:
        """The architecture that a config of an encoder names; without one the first in this file."""
        names = config.get("architectures") or ()
        return next((name for name in names if name in self.heads), self.architectures[0])

    def of_architecture(self, name: str) -> FamilyData:
        """What the file says of one architecture of an encoder: its tensors alone, named as this model names them."""
        prefix = (self.optional_prefix or "") if self.heads[name] == "none" else ""
        tensors = [
            t.model_copy(update={"name": t.name.removeprefix(prefix)})
            for t in self.tensors
            if not t.architectures or name in t.architectures
        ]
        names = {t.name for t in tensors}
        outside = ("embed", "layers", "final_norm", "rotary", "pooler")
        sites: dict[str, Any] = {site: getattr(self.sites, site).removeprefix(prefix) for site in outside}
        if self.heads[name] == "none":
            sites |= {"head": "", "transform": ()}
        elif self.heads[name] == "classes" and self.class_head is not None:
            sites |= {"head": self.class_head.head, "transform": self.class_head.transform}
        else:
            sites["pooler"] = ""  # transformers' model has none
        return self.model_copy(
            update={
                "architectures": (name,),
                "tensors": tuple(tensors),
                "ties": tuple(tie for tie in self.ties if {tie.tensor, tie.to} <= names),
                "drops": tuple(drop for drop in self.drops if not fnmatch.filter(names, drop.tensors)),
                "sites": self.sites.model_copy(update=sites),
                "optional_prefix": None if prefix else self.optional_prefix,
            }
        )

    @model_validator(mode="after")
    def _heads_are_of_architectures(self) -> FamilyData:
        if self.heads and set(self.heads) != set(self.architectures):
            raise ValueError(f"heads: expected an entry for each of {', '.join(self.architectures)}")
        if ("classes" in self.heads.values()) != (self.class_head is not None):
            raise ValueError("class_head: needed where an architecture tells classes, and of no use elsewhere")
        if unknown := {name for t in self.tensors for name in t.architectures} - set(self.heads):
            raise ValueError(f"tensors: architectures names {sorted(unknown)}, which heads lacks")
        return self

    @model_validator(mode="after")
    def _references_exist(self) -> FamilyData:
        missing = sorted(set(DIMS) - set(OPTIONAL_DIMS) - set(self.dims))
        if missing:
            raise ValueError(f"dims lacks {', '.join(missing)}")
        flags = {flag for t in self.tensors for flag in (t.when, t.unless) if flag} | {tie.when for tie in self.ties}
        if flags != set(self.flags):
            raise ValueError(f"flags are {sorted(self.flags)} but the tensors and ties use {sorted(flags)}")
        if self.window and self.window.layers not in {None, *(entry.field for entry in self.layer_lists)}:
            raise ValueError(f"window.layers: {self.window.layers} is not in layer_lists")
        names = {t.name for t in self.tensors}
        counted = {field.counts for field in self.dims.values() if field.counts is not None}
        if missing_lists := counted - {entry.field for entry in self.layer_lists}:
            raise ValueError(f"dims: {', '.join(missing_lists)} is not in layer_lists")
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
        axes += [product.equals for product in self.products]
        axes += [self.cached, *filter(None, self.cached_in.values())]
        if self.layer_inputs not in {None, *self.sizes}:
            raise ValueError(f"layer_inputs: {self.layer_inputs!r} is not in sizes")
        fields = [*self.dims.values(), *([self.experts_per_token] if self.experts_per_token else [])]
        if loose_rules := [rule.by for rule in self.constraints if rule.by is not None and rule.by not in known]:
            raise ValueError(f"constraints: {loose_rules[0]!r} is neither in dims nor in sizes")
        if any(size.of_layers for size in self.sizes.values()) and self.layer_overrides is None:
            raise ValueError("sizes: of_layers needs layer_overrides")
        axes_of = [text for f in fields for text in (f.absent, f.null, f.always) if isinstance(text, str)]
        named = {name for text in axes_of for name in expression_names(text)}
        if named - known:
            raise ValueError(f"dims: {sorted(named - known)[0]!r} is neither in dims nor in sizes")
        for axis in axes:
            unknown = [f for block in axis_blocks(axis) for f in block if isinstance(f, str) and f not in known]
            if unknown:
                raise ValueError(f"axes: {axis!r} uses {unknown[0]!r}, which is neither in dims nor in sizes")
        multiples = {(rule.dim, rule.by) for rule in self.constraints}
        for axis, groups in ((axis, groups) for axis in axes if (groups := axis_groups(axis)) is not None):
            firsts = {block[0] for block in axis_blocks(axis)} - {groups}
            if loose := sorted(str(first) for first in firsts if (first, groups) not in multiples):
                raise ValueError(f"axes: {axis!r} needs a constraint that {loose[0]} is a multiple of {groups}")
        named |= {rule.by for rule in self.constraints if rule.by is not None}
        unused = set(self.sizes) - named - {f for axis in axes for block in axis_blocks(axis) for f in block}
        if unused:
            raise ValueError(f"sizes {sorted(unused)} are not used by any tensor")
        return self

    @model_validator(mode="after")
    def _experts_agree(self) -> FamilyData:
        given = {
            "dims.experts": "experts" in self.dims,
            "experts_per_token": self.experts_per_token is not None,
            "a tensor of each {expert}": any(t.per_expert or t.stacked for t in self.tensors),
            "sites.experts": any(sites.experts for sites in (self.sites, *self.sites_in.values())),
        }
        if len(set(given.values())) > 1:
            lacks = ", ".join(what for what, is_given in given.items() if not is_given)
            raise ValueError(f"a mixture of experts needs all of {', '.join(given)}; this file lacks {lacks}")
        return self

    @model_validator(mode="after")
    def _mixers_agree(self) -> FamilyData:
        given = {f"dims.{dim}": dim in self.dims for dim in SSM_DIMS}
        given["sites.ssm"] = any(sites.ssm for sites in (self.sites, *self.sites_in.values()))
        given["a tensor with the role ssm_out"] = any(t.role == "ssm_out" for t in self.tensors)
        if len(set(given.values())) > 1:
            lacks = ", ".join(what for what, is_given in given.items() if not is_given)
            raise ValueError(f"layers with a state need all of {', '.join(given)}; this file lacks {lacks}")
        return self

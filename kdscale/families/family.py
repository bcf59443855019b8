"""A family applied to one config: dimensions, tensors, parameter counts and the student's config."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from kdscale.errors import CheckpointError, ConfigError
from kdscale.families.config_values import first_position, flag_of, full_name, with_sizes
from kdscale.families.dims import NEVER_CUT, Dims, ParamCount
from kdscale.families.expert_groups import expert_groups, group_violations
from kdscale.families.kept_heads import KeptHeads
from kdscale.families.layer_fields import (
    Config,
    broken_constraints,
    changed_axes,
    counted,
    cut_layer_fields,
    layer_list,
    narrowed,
    overrides,
    products_that_differ,
    underived_sizes,
    undivided_products,
)
from kdscale.families.layer_kinds import Kinds, layer_kinds, unread_names, write_layer_kinds
from kdscale.families.limits import LARGEST, MOST_EXPERTS, check_size
from kdscale.families.schema import (
    Component,
    DimField,
    DimName,
    FamilyData,
    LayerList,
    Sites,
    TensorTemplate,
    axis_blocks,
    axis_size,
    evaluate,
)
from kdscale.families.tensor_specs import TensorSpec, layer_specs, tensor_spec

# The axis of each dimension of a tensor that goes along with a model; None: one that no cut changes; empty: none does.
CarriedAxes = tuple[str | None, ...]


class Family:
    """What one model family looks like on disk and in its config.

    `where` is the path of config.json, for errors; `config` is the teacher's, on which some rules depend. Of an encoder
    it is about the architecture that the config names.
    """

    def __init__(self, data: FamilyData, where: str, config: Config):
        self._strips = ""  # what the names of this architecture lack
        if data.is_encoder:
            whole, data = data, data.of_architecture(data.architecture_in(config))
            self._strips = "" if data.optional_prefix else whole.optional_prefix or ""
        self.data = data
        self.where = where
        self._kept = KeptHeads()
        self.fixed_sizes = {name: self.fixed_size(name, config) for name in data.sizes}
        self._rules = [rule for rule in data.constraints if rule.applies(config)]
        self._config = config

    @property
    def name(self) -> str:
        """The family's name, as in its file."""
        return self.data.name

    @property
    def is_encoder(self) -> bool:
        """Whether its models read a text from both sides, and write none."""
        return self.data.is_encoder

    @property
    def head(self) -> str:
        """What stands on its models, as `head_kind` says."""
        return self.data.heads[self.data.architectures[0]] if self.is_encoder else "causal_lm"

    @cached_property
    def experts_per_token(self) -> int:
        """How many experts of a mixture a token is routed to, which no cut changes; 0 in dense models."""
        field = self.data.experts_per_token
        return 0 if field is None else self._size(field, self._config, {})

    @cached_property
    def expert_groups(self) -> tuple[int, int]:
        """(groups of experts, how many of them a token may choose), which no cut changes; (1, 1) without groups."""
        return expert_groups(self.data.expert_groups, self._config, self.where)

    @property
    def sites(self) -> Sites:
        """The modules of the transformers model that pruning reads and changes; of a layer, what all kinds have."""
        return self.data.sites

    def layer_sites(self, config: Config, layer: int) -> Sites:
        """The same with the sites that this layer's kinds have, and without those of tensors that are not there."""
        sites = self.data.sites_of(self.layer_kinds(config)[layer])
        return sites if "shared_ffn" in self.layer_axes(config, layer) else sites.model_copy(update={"shared": ""})

    # -- kinds of layers -----------------------------------------------------------------------------------------------

    def layer_kinds(self, config: Config) -> list[Kinds]:
        """The kinds of each layer, by which its tensors differ; the same for all layers of most families."""
        return layer_kinds(self.data, config, self.dims(config).layers, self.where)

    def layers_by_kind(self, config: Config) -> dict[int, int]:
        """The first layer of each kind → how many there are."""
        kinds = self.layer_kinds(config)
        return {kinds.index(each): count for each, count in Counter(kinds).items()}

    def layer_axes(self, config: Config, layer: int) -> frozenset[str]:
        """The dimensions of the tensors of a layer, and kv heads where those are as many as the heads (GPT-NeoX)."""
        templates = self._layer_templates(config, layer)
        names = {factor for t in templates for axis in t.axes for block in axis_blocks(axis) for factor in block}
        if "heads" in names:
            names.add("kv_heads")
        return frozenset(str(name) for name in names if name in self.data.dims)

    def _layer_templates(self, config: Config, layer: int) -> list[TensorTemplate]:
        """The templates of one layer; those with an axis of size 0 are not there."""
        kinds, sizes = self.layer_kinds(config)[layer], self._sizes(config)
        there = (t for t in self._groups(config)[1] if self.data.exists_in(t, kinds))
        return [t for t in there if all(axis_size(axis, sizes) for axis in t.axes)]

    # -- a model around this one ---------------------------------------------------------------------------------------

    def language(self, config: Config) -> dict[str, Any]:
        """The config of the language model alone, as transformers' causal LM takes it."""
        return dict(config)

    @property
    def language_names(self) -> dict[str, str]:
        """Beginnings of names on disk → of the causal LM's parameters; empty where the checkpoint is that model."""
        return {}

    @property
    def module_in_whole(self) -> str | None:
        """The causal LM's base model as a module of the model around it; None where there is none."""
        return None

    def carried(self, name: str) -> bool:
        """Whether a tensor is no part of the causal LM, and goes along with it."""
        return self.kept_head(name)

    def kept_head(self, name: str) -> bool:
        """Whether a tensor is of a head that transformers' causal LM has not and that is kept nevertheless."""
        return name in self._kept

    def keeping_heads(self, config: Config) -> Self:
        """The same family for a student that keeps the heads that it would do without (see `Drop.kept_with`).

        `config` is the teacher's. Raises ConfigError for a family that has no such heads.
        """
        family = copy.copy(self)
        family._kept = KeptHeads.of(self.data, self.dims(config))
        return family

    def carried_axes(self, name: str) -> CarriedAxes:
        """Where a carried tensor has the channels of the residual stream."""
        del name
        return ()

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def dims(self, config: Config) -> Dims:
        """Read the model's sizes from a config, with transformers' own defaults for absent and null fields.

        Raises CheckpointError for a missing, non-positive or absurdly large field and for sizes that transformers would
        refuse.
        """
        dims = self._read_dims(config)
        check_size(f"{self.where}: layers * experts", dims.layers * dims.experts, MOST_EXPERTS)
        if wrong := self._broken_rules(dims) or products_that_differ(self.data, config, dims):
            raise CheckpointError(f"{self.where}: the sizes do not fit together", got="; ".join(wrong))
        return dims

    def _read_dims(self, config: Config) -> Dims:
        """The sizes whether or not they fit together."""
        sizes: dict[str, int] = {}
        for name in sorted(self.data.dims, key=self._reading_order):
            field, flag = self.data.dims[name], self.data.dims[name].when
            absent = flag is not None and not flag_of(self.data, config, flag, self.where)
            sizes[name] = 0 if absent else self._size(field, config, sizes)
            check_size(f"{self.where}: {field.field or name}", sizes[name], LARGEST[name])
        return Dims(**sizes)

    def _reading_order(self, dim: DimName) -> tuple[bool, bool]:
        """hidden and heads first, since the others may fall back on them; last what follows from other sizes."""
        return self.data.dims[dim].always is not None, dim not in ("hidden", "heads")

    def _size(self, field: DimField, config: Config, sizes: Mapping[str, int]) -> int:
        if field.always is not None:
            return evaluate(field.always, {**self.fixed_sizes, **sizes})
        name = field.name_in(config)
        for alias in field.aliases:
            if config.get(alias, config.get(name)) != config.get(name):
                got = f"{config.get(name)!r} and {config[alias]!r}"
                raise CheckpointError(f"{self.where}: {name} and {alias}", expected="equal values", got=got)
        value, fallback = config.get(name), field.null if name in config else field.absent
        if value is None and fallback is not None:
            value = fallback if isinstance(fallback, int) else evaluate(fallback, sizes)
        if field.narrowed is not None:
            value = narrowed(field.narrowed, value, config, self.where)
        if field.counts is not None:
            value = counted(self.data, field.counts, name, value, config, self.where)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            got = repr(value) if name in config else "no such field"
            raise CheckpointError(f"{self.where}: {name}", expected="a positive integer", got=got)
        return value

    def violations(self, dims: Dims) -> list[str]:
        """One sentence for each rule of the family that `dims` breaks; empty when such a student can be built."""
        fixed = changed_axes(self.data, dims, self._read_dims(self._config)) if self.data.uncut else []
        return self._broken_rules(dims) + fixed

    def _broken_rules(self, dims: Dims) -> list[str]:
        """The rules that any model of the family is held to."""
        out = broken_constraints(self._rules, dims, self.fixed_sizes)
        out += underived_sizes(self.data, dims, self.fixed_sizes) + undivided_products(self.data, dims)
        if dims.experts < (chosen := self.experts_per_token):
            out.append(f"experts ({dims.experts}) are fewer than the {chosen} that each token is routed to")
        out += group_violations(self.data.expert_groups, self.expert_groups, dims.experts, chosen)
        return out + self._kept.violations(dims)

    # -- tensors -------------------------------------------------------------------------------------------------------

    def tensors(self, config: Config) -> dict[str, TensorSpec]:
        """Every tensor on disk in file order: embedding, layers, final norm, head (absent when tied)."""
        sizes, kinds = self._sizes(config), self.layer_kinds(config)
        before, _, after = self._groups(config)
        specs = {t.name: tensor_spec(t, sizes, None) for t in before}
        templates = {kinds[layer]: self._layer_templates(config, layer) for layer in self.layers_by_kind(config)}
        for layer, each in enumerate(kinds):
            specs |= layer_specs(templates[each], sizes, layer)
        return specs | {t.name: tensor_spec(t, sizes, None) for t in after}

    def layer_tensors(self, config: Config, layer: int) -> dict[str, TensorSpec]:
        """The tensors of one layer. Raises IndexError for a layer that the config does not have."""
        layers = self.dims(config).layers
        if not 0 <= layer < layers:
            raise IndexError(f"layer {layer} of {layers}")
        return layer_specs(self._layer_templates(config, layer), self._sizes(config), layer)

    def outer_tensors(self, config: Config) -> dict[str, TensorSpec]:
        """The tensors outside the layers: embedding, final norm, head (absent when tied)."""
        sizes = self._sizes(config)
        before, _, after = self._groups(config)
        return {t.name: tensor_spec(t, sizes, None) for t in (*before, *after)}

    def parameter_components(self, config: Config) -> dict[str, Component]:
        """Parameter of the transformers model → which part of the model it is (`TensorSpec.component`)."""
        return {spec.parameter: spec.component for spec in self.tensors(config).values()}

    def _sizes(self, config: Config) -> dict[str, int]:
        """What axes may name: the dimensions and the family's other sizes."""
        return self.dims(config).sizes() | {name: self.fixed_size(name, config) for name in self.data.sizes}

    def fixed_size(self, name: str, config: Config) -> int:
        """One of the family file's `sizes`, e.g. `positions`. Raises CheckpointError when it is no positive integer."""
        size = self.data.sizes[name]
        said = {} if size.of_layers is None else overrides(self.data, config, self.where)
        field, holder = (size.of_layers, said) if said else (size.field, config)
        counts = bool(said) or size.only_with is None or config.get(size.only_with, False)
        if isinstance(size.absent, str) and not (counts and holder.get(str(field)) is not None):
            return self._size(self.data.dims[size.absent], config, {})  # which never changes either
        if said:
            return self._size(DimField(field=field, absent=size.absent), said, {})
        if size.entries is not None:
            named = config.get(size.entries)
            return len(named) if isinstance(named, dict) and named else int(size.absent or 0)
        if size.field is None:
            parts = (DimField(field=field, absent=absent) for field, absent in size.sum.items())
            return sum(self._size(part, config, {}) for part in parts)
        if size.optional and config.get(size.field, size.absent) in (None, 0):
            return 0
        return self._size(DimField(field=size.field, absent=size.absent), config, {})

    def first_position(self, config: Config) -> int:
        """The row of the learned positions that a document's first token has; 0 without learned positions."""
        return first_position(self.data, config)

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors start with, e.g. `model.layers.3.`"""
        return f"{self.sites.layers}.{layer}."

    def tied(self, config: Config) -> dict[str, str]:
        """Tensor → the tensor whose storage it shares, e.g. `{"lm_head.weight": "model.embed_tokens.weight"}`."""
        return {tie.tensor: tie.to for tie in self.data.ties if flag_of(self.data, config, tie.when, self.where)}

    def ignored(self) -> tuple[str, ...]:
        """Globs of names that checkpoints contain and no model reads (rotary buffers)."""
        return (*self.data.ignored, *unread_names(self.data, lambda: self.layer_kinds(self._config)))

    def dropped(self) -> dict[str, str]:
        """Glob of tensors that the student does without → what they are."""
        drops = [drop for drop in self.data.drops if drop not in self._kept.drops]
        return {drop.glob(lambda: self.dims(self._config).layers): drop.what for drop in drops}

    def parameter(self, name: str) -> str:
        """The parameter of a tensor outside the layers, also of one that is not on disk because it is tied."""
        return next(t.loads_as or t.name for t in self.data.tensors if t.name == name)

    def full_name(self, name: str) -> str:
        """A tensor's name as in the family file, for an old one, or one of a checkpoint that lacks the prefix (of the
        base model) or has it where the architecture lacks it."""
        return full_name(self.data, name.removeprefix(self._strips))

    def transposed(self, role: str) -> bool:
        """Whether the projection is stored [input, output] (GPT-2's Conv1D), not [output, input] like nn.Linear."""
        of_role = (t for t in self.data.tensors if t.role == role and not t.per_expert and not t.stacked)
        axes = next((t.axes for t in of_role), None)
        return axes is not None and role in ("o", "down", "shared_down") and axes[-1] == "hidden"

    def output_by_input(self, role: str, weight: Any) -> Any:
        """A projection as it is stored → [output, input], or back: a transposed view where that differs."""
        return weight.T if self.transposed(role) else weight

    def cached_numbers(self, config: Config) -> int:
        """How many numbers of a token all layers together keep for the tokens after it."""
        kinds, sizes = self.layer_kinds(config), self._sizes(config)
        attending = {
            layer: count for layer, count in self.layers_by_kind(config).items()
            if "kv_heads" in self.layer_axes(config, layer)
        }  # fmt: skip
        axes = ((self.data.cached_of(kinds[layer]), n) for layer, n in attending.items())
        return sum(axis_size(axis, sizes) * n for axis, n in axes if axis is not None)

    # -- figures -------------------------------------------------------------------------------------------------------

    def count_params(self, config: Config) -> ParamCount:
        """Count parameters from the tensors on disk; a tied head counts once."""
        outer, dims = self.outer_tensors(config), self.dims(config)
        embedding = sum(spec.parameters for spec in outer.values() if spec.counts_as_embedding)
        rest = sum(spec.parameters for spec in outer.values() if not spec.counts_as_embedding)
        experts = 0
        for layer, count in self.layers_by_kind(config).items():
            specs = self.layer_tensors(config, layer).values()
            rest += sum(spec.parameters for spec in specs) * count
            experts += sum(spec.parameters for spec in specs if spec.of_experts) * count
        # experts are of one size, so what a token does not use is a whole number
        idle = experts // dims.experts * (dims.experts - self.experts_per_token) if experts else 0
        return ParamCount(embedding + rest, embedding, rest, embedding + rest - idle)

    # -- the student ---------------------------------------------------------------------------------------------------

    def student_config(self, config: Config, dims: Dims, kept_layers: Sequence[int]) -> dict[str, Any]:
        """The teacher's config with the student's sizes written out and its per-layer fields cut to `kept_layers`.

        Raises ConfigError for sizes the family refuses, ValueError for layers that are not an ascending selection
        of the teacher's or do not match `dims.layers`, or a size that differs and never changes.
        """
        teacher = self.dims(config)
        kept = list(kept_layers)
        if kept != sorted(set(kept)) or len(kept) != dims.layers or not all(0 <= i < teacher.layers for i in kept):
            raise ValueError(f"kept_layers must be {dims.layers} ascending layers below {teacher.layers}, got {kept}")
        if any(getattr(dims, name) != getattr(teacher, name) for name in NEVER_CUT):
            raise ValueError(f"{', '.join(NEVER_CUT)} never change")
        if wrong := self.violations(dims):
            raise ConfigError(f"no {self.name} model has the student's sizes", got="; ".join(wrong))
        student = self.with_sizes(config, dims)
        for drop in (drop for drop in self.data.drops if drop not in self._kept.drops):
            student |= {field: value for field, value in drop.config.items() if field in student}
        if len(kept) < teacher.layers:
            cut_layer_fields(self.data, config, student, kept, teacher.layers, self.where)
            kinds = self.layer_kinds(config)
            write_layer_kinds(self.data, student, [kinds[layer] for layer in kept], self.where)
        return student

    def with_sizes(self, config: Config, dims: Dims) -> dict[str, Any]:
        """The same config with `dims` in the fields that say sizes; nothing that has an entry a layer is cut."""
        return with_sizes(self.data, config, dims)

    def layer_list(self, entry: LayerList, config: Config, layers: int) -> list[Any] | None:
        """One value a layer, as transformers takes them when the field is absent; None if there is nothing to cut."""
        return layer_list(entry, config, layers, self.where)

    # -- helpers -------------------------------------------------------------------------------------------------------

    @cached_property
    def _first_layered(self) -> int:
        return next(i for i, t in enumerate(self.data.tensors) if t.per_layer)

    def _groups(self, config: Config) -> tuple[list[TensorTemplate], list[TensorTemplate], list[TensorTemplate]]:
        """Templates that exist under this config: before the layers, of one layer, after the layers."""
        there = [(i, t) for i, t in enumerate(self.data.tensors) if self._exists(t, config)]
        return (
            [t for i, t in there if not t.per_layer and i < self._first_layered],
            [t for _, t in there if t.per_layer],
            [t for i, t in there if not t.per_layer and i > self._first_layered],
        )

    def _exists(self, template: TensorTemplate, config: Config) -> bool:
        if template.when is not None and not flag_of(self.data, config, template.when, self.where):
            return False
        return template.unless is None or not flag_of(self.data, config, template.unless, self.where)

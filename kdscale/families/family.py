"""A family applied to one config: dimensions, tensors, parameter counts and the student's config.

Dimension names: hidden (residual stream), ffn (intermediate; of one expert in a mixture), heads (query heads), kv_heads
(key/value groups), head_dim, layers, vocab, experts (0 in dense models).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from kdscale.errors import CheckpointError, ConfigError
from kdscale.families.limits import LARGEST, MOST_EXPERTS, check_size
from kdscale.families.schema import (
    COMPONENT_OF,
    EXPERT,
    LAYER,
    Component,
    Constraint,
    DimField,
    FamilyData,
    LayerList,
    Sites,
    TensorTemplate,
    axis_blocks,
    block_size,
    evaluate,
)

Config = Mapping[str, Any]

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
class TensorSpec:
    """One tensor on disk: `axes[i]` names dimension i of `shape`; `layer` is None for embedding, final norm, head.

    `parameter` is the name in the transformers model of what it is (a part of), `expert` the number of the expert of a
    mixture that it belongs to.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layer: int | None
    role: str
    parameter: str
    expert: int | None = None

    @property
    def component(self) -> Component:
        """Which part of the model this is: embedding, attention, ffn (experts and router too), norm or head."""
        return COMPONENT_OF[self.role]

    @property
    def counts_as_embedding(self) -> bool:
        """Whether this grows with the vocabulary or the context, not with the depth: embeddings and the head."""
        return self.component in ("embedding", "head")


@dataclass(frozen=True)
class ParamCount:
    """`embedding` is the embeddings (learned positions too) plus the head (once when tied); `non_embedding` the rest.

    `active` is what one token uses: all of a dense model, and of a mixture only the experts that it is routed to.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int


class Family:
    """What one model family looks like on disk and in its config.

    `where` is the path of config.json, for errors; `config` is the teacher's, on which some rules depend.
    """

    def __init__(self, data: FamilyData, where: str, config: Config):
        self.data = data
        self.where = where
        self._rules = [rule for rule in data.constraints if _applies(rule, config)]
        self._per_token = None if data.experts_per_token is None else self._size(data.experts_per_token, config, {})

    @property
    def name(self) -> str:
        """The family's name, as in its file."""
        return self.data.name

    @property
    def experts_per_token(self) -> int:
        """How many experts of a mixture a token is routed to, which no cut changes; 0 in dense models."""
        return self._per_token or 0

    @property
    def sites(self) -> Sites:
        """The modules of the transformers model that pruning reads and changes."""
        return self.data.sites

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def dims(self, config: Config) -> Dims:
        """Read the model's sizes from a config, with transformers' own defaults for absent and null fields.

        Raises CheckpointError for a missing, non-positive or absurdly large field and for sizes that transformers would
        refuse.
        """
        sizes: dict[str, int] = {}
        # hidden and heads first: the others may fall back on them
        for name in sorted(self.data.dims, key=lambda dim: dim not in ("hidden", "heads")):
            sizes[name] = self._size(self.data.dims[name], config, sizes)
            check_size(f"{self.where}: {self.data.dims[name].field or name}", sizes[name], LARGEST[name])
        dims = Dims(**sizes)
        check_size(f"{self.where}: layers * experts", dims.layers * dims.experts, MOST_EXPERTS)
        if wrong := self.violations(dims):
            raise CheckpointError(f"{self.where}: the sizes do not fit together", got="; ".join(wrong))
        return dims

    def _size(self, field: DimField, config: Config, sizes: Mapping[str, int]) -> int:
        if field.always is not None:
            return evaluate(field.always, sizes)
        name = field.name_in(config)
        for alias in field.aliases:
            if config.get(alias, config.get(name)) != config.get(name):
                got = f"{config.get(name)!r} and {config[alias]!r}"
                raise CheckpointError(f"{self.where}: {name} and {alias}", expected="equal values", got=got)
        value, fallback = config.get(name), field.null if name in config else field.absent
        if value is None and fallback is not None:
            value = fallback if isinstance(fallback, int) else evaluate(fallback, sizes)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            got = repr(value) if name in config else "no such field"
            raise CheckpointError(f"{self.where}: {name}", expected="a positive integer", got=got)
        return value

    def violations(self, dims: Dims) -> list[str]:
        """One sentence for each rule of the family that `dims` breaks; empty when such a model can be built."""
        sizes, out = asdict(dims), []
        for rule in self._rules:
            if rule.by is not None and sizes[rule.dim] % sizes[rule.by]:
                out.append(
                    f"{rule.dim} ({sizes[rule.dim]}) is not a multiple of {rule.by} ({sizes[rule.by]}): {rule.why}"
                )
            if rule.equals is not None and sizes[rule.dim] != dims.axis_size(rule.equals):
                product = f"{rule.equals} ({dims.axis_size(rule.equals)})"
                out.append(f"{rule.dim} ({sizes[rule.dim]}) is not {product}: {rule.why}")
        for name, field in self.data.dims.items():
            if field.always is not None and sizes[name] != evaluate(field.always, sizes):
                derived = f"{field.always} ({evaluate(field.always, sizes)})"
                out.append(f"{name} ({sizes[name]}) is not {derived}: the family's config has no field for it")
        if self._per_token is not None and dims.experts < self._per_token:
            out.append(f"experts ({dims.experts}) are fewer than the {self._per_token} that each token is routed to")
        return out

    # -- tensors -------------------------------------------------------------------------------------------------------

    def tensors(self, config: Config) -> dict[str, TensorSpec]:
        """Every tensor on disk in file order: embedding, layers, final norm, head (absent when tied)."""
        sizes, layers = self._sizes(config), self.dims(config).layers
        before, layered, after = self._groups(config)
        specs = {t.name: _spec(t, sizes, None) for t in before}
        for layer in range(layers):
            specs |= _layer_specs(layered, sizes, layer)
        return specs | {t.name: _spec(t, sizes, None) for t in after}

    def layer_tensors(self, config: Config, layer: int) -> dict[str, TensorSpec]:
        """The tensors of one layer. Raises IndexError for a layer that the config does not have."""
        layers = self.dims(config).layers
        if not 0 <= layer < layers:
            raise IndexError(f"layer {layer} of {layers}")
        return _layer_specs(self._groups(config)[1], self._sizes(config), layer)

    def outer_tensors(self, config: Config) -> dict[str, TensorSpec]:
        """The tensors outside the layers: embedding, final norm, head (absent when tied)."""
        sizes = self._sizes(config)
        before, _, after = self._groups(config)
        return {t.name: _spec(t, sizes, None) for t in (*before, *after)}

    def parameter_components(self, config: Config) -> dict[str, Component]:
        """Parameter of the transformers model → which part of the model it is (`TensorSpec.component`)."""
        return {spec.parameter: spec.component for spec in self.tensors(config).values()}

    def _sizes(self, config: Config) -> dict[str, int]:
        """What axes may name: the dimensions and the family's other sizes."""
        return asdict(self.dims(config)) | {name: self.fixed_size(name, config) for name in self.data.sizes}

    def fixed_size(self, name: str, config: Config) -> int:
        """One of the family file's `sizes`, e.g. `positions`. Raises CheckpointError when it is no positive integer."""
        field = self.data.sizes[name]
        return self._size(DimField(field=field.field, absent=field.absent), config, {})

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors start with, e.g. `model.layers.3.`"""
        return f"{self.sites.layers}.{layer}."

    def tied(self, config: Config) -> dict[str, str]:
        """Tensor → the tensor whose storage it shares, e.g. `{"lm_head.weight": "model.embed_tokens.weight"}`."""
        return {tie.tensor: tie.to for tie in self.data.ties if self._flag(config, tie.when)}

    def ignored(self) -> tuple[str, ...]:
        """Globs of names that old checkpoints contain and no model reads (rotary buffers)."""
        return self.data.ignored

    def dropped(self) -> dict[str, str]:
        """Glob of tensors that the student does without → what they are."""
        return {drop.tensors: drop.what for drop in self.data.drops}

    def parameter(self, name: str) -> str:
        """The parameter of a tensor outside the layers, also of one that is not on disk because it is tied."""
        return next(t.loads_as or t.name for t in self.data.tensors if t.name == name)

    def full_name(self, name: str) -> str:
        """A tensor's name as in the family file, for one of a checkpoint that lacks the prefix (of the base model)."""
        prefix = self.data.optional_prefix
        known = prefix is None or name.startswith(prefix) or any(name == t.name for t in self.data.tensors)
        return name if known else f"{prefix}{name}"

    def transposed(self, role: str) -> bool:
        """Whether the projection is stored [input, output] (GPT-2's Conv1D), not [output, input] like nn.Linear."""
        axes = next((t.axes for t in self.data.tensors if t.role == role), None)
        return axes is not None and role in ("o", "down") and axes[-1] == "hidden"

    def output_by_input(self, role: str, weight: Any) -> Any:
        """A projection as it is stored → [output, input], or back: a transposed view where that differs."""
        return weight.T if self.transposed(role) else weight

    # -- figures -------------------------------------------------------------------------------------------------------

    def count_params(self, config: Config) -> ParamCount:
        """Count parameters from the tensors on disk; a tied head counts once."""
        outer, dims = self.outer_tensors(config), self.dims(config)
        embedding = sum(math.prod(spec.shape) for spec in outer.values() if spec.counts_as_embedding)
        rest = sum(math.prod(spec.shape) for spec in outer.values() if not spec.counts_as_embedding)
        one_layer = self.layer_tensors(config, 0).values()
        rest += sum(math.prod(spec.shape) for spec in one_layer) * dims.layers
        experts = sum(math.prod(spec.shape) for spec in one_layer if spec.expert is not None) * dims.layers
        # experts are of one size, so what a token does not use is a whole number
        idle = experts // dims.experts * (dims.experts - (self._per_token or 0)) if experts else 0
        return ParamCount(embedding + rest, embedding, rest, embedding + rest - idle)

    # -- the student ---------------------------------------------------------------------------------------------------

    def student_config(self, config: Config, dims: Dims, kept_layers: Sequence[int]) -> dict[str, Any]:
        """The teacher's config with the student's sizes written out and its per-layer fields cut to `kept_layers`.

        Raises ConfigError for sizes the family refuses, ValueError for layers that are not an ascending selection
        of the teacher's or do not match `dims.layers`, or a head_dim or vocab that differs from the teacher's.
        """
        teacher = self.dims(config)
        kept = list(kept_layers)
        if kept != sorted(set(kept)) or len(kept) != dims.layers or not all(0 <= i < teacher.layers for i in kept):
            raise ValueError(f"kept_layers must be {dims.layers} ascending layers below {teacher.layers}, got {kept}")
        if (dims.head_dim, dims.vocab) != (teacher.head_dim, teacher.vocab):
            raise ValueError("head_dim and vocab never change")
        if wrong := self.violations(dims):
            raise ConfigError(f"no {self.name} model has the student's sizes", got="; ".join(wrong))
        student = copy.deepcopy(dict(config))
        for name, field in self.data.dims.items():
            if field.field is not None:
                written = {field.name_in(config), *(alias for alias in field.aliases if alias in config)}
                student |= dict.fromkeys(written, getattr(dims, name))
        for drop in self.data.drops:
            student |= {field: value for field, value in drop.config.items() if field in student}
        for entry in self.data.layer_lists:
            values = self.layer_list(entry, config, teacher.layers)
            if values is not None and len(kept) < teacher.layers:
                student[entry.field] = [values[i] for i in kept]
                self._drop_stale_interval(entry, student)
        if len(kept) < teacher.layers:
            for boundary in self.data.layer_boundaries:
                border = config.get(boundary.field, boundary.absent)
                if type(border) is not int:
                    what = f"{self.where}: {boundary.field}"
                    raise CheckpointError(what, expected="a number of layers", got=repr(border))
                student[boundary.field] = sum(layer < border for layer in kept)
        return student

    def _drop_stale_interval(self, entry: LayerList, student: dict[str, Any]) -> None:
        """Remove the fields that still say the list as one interval, where no interval gives the cut list."""
        every_field = entry.absent.every_field if entry.absent else None
        for name in (every_field, *entry.said_too):
            if name in student:
                plain = {**student, entry.field: None} | ({every_field: student[name]} if every_field else {})
                if self.layer_list(entry, plain, len(student[entry.field])) != student[entry.field]:
                    del student[name]

    def layer_list(self, entry: LayerList, config: Config, layers: int) -> list[Any] | None:
        """One value a layer, as transformers takes them when the field is absent; None if there is nothing to cut."""
        values, rule = config.get(entry.field), entry.absent
        if values is None and rule is not None:
            every = config.get(rule.every_field, rule.every) if rule.every_field else rule.every
            if not isinstance(every, int) or every < 1:
                where = f"{self.where}: {rule.every_field}"
                raise CheckpointError(where, expected="a positive integer", got=repr(every))
            return [rule.others if (layer + 1) % every else rule.last for layer in range(layers)]
        if values is not None and (not isinstance(values, list) or len(values) < layers):
            raise CheckpointError(
                f"{self.where}: {entry.field}", expected=f"a list of {layers} entries", got=repr(values)
            )
        return values

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
        if template.when is not None and not self._flag(config, template.when):
            return False
        return template.unless is None or not self._flag(config, template.unless)

    def _flag(self, config: Config, name: str) -> bool:
        flag = self.data.flags[name]
        value = config.get(flag.field, flag.absent)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {flag.field}", expected="true or false", got=repr(value))
        return value


def _spec(
    template: TensorTemplate, sizes: Mapping[str, int], layer: int | None, expert: int | None = None
) -> TensorSpec:
    return TensorSpec(
        shape=tuple(sum(block_size(block, sizes) for block in axis_blocks(axis)) for axis in template.axes),
        axes=template.axes,
        layer=layer,
        role=template.role,
        parameter=_numbered(template.loads_as or template.name, layer, expert),
        expert=expert,
    )


def _layer_specs(templates: Sequence[TensorTemplate], sizes: Mapping[str, int], layer: int) -> dict[str, TensorSpec]:
    """One layer's tensors in file order; experts follow one another in the place of the first of their tensors."""
    specs: dict[str, TensorSpec] = {}
    of_experts = [t for t in templates if t.per_expert]
    for template in templates:
        if not template.per_expert:
            specs[_numbered(template.name, layer, None)] = _spec(template, sizes, layer)
        elif template is of_experts[0]:
            for expert in range(sizes["experts"]):
                specs |= {_numbered(t.name, layer, expert): _spec(t, sizes, layer, expert) for t in of_experts}
    return specs


def _numbered(name: str, layer: int | None, expert: int | None) -> str:
    name = name if layer is None else name.replace(LAYER, str(layer))
    return name if expert is None else name.replace(EXPERT, str(expert))


def _applies(rule: Constraint, config: Config) -> bool:
    return not rule.when_present or any(_dotted(config, path) is not None for path in rule.when_present)


def _dotted(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config

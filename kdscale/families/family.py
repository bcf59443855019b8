"""A family applied to one config: dimensions, tensors, parameter counts and the student's config.

Dimension names: hidden (residual stream), ffn (intermediate), heads (query heads), kv_heads (key/value groups),
head_dim, layers, vocab.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.families.schema import LAYER, FamilyData, Sites, TensorTemplate

Config = Mapping[str, Any]


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

    def replace(self, **sizes: int) -> Dims:
        return replace(self, **sizes)

    def axis_size(self, axis: str) -> int:
        """Size of a tensor dimension from its axis: `ffn`, or a product such as `heads*head_dim`."""
        return math.prod(getattr(self, part) for part in axis.split("*"))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on disk: `axes[i]` names dimension i of `shape`; `layer` is None for embedding, final norm, head."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layer: int | None
    role: str


@dataclass(frozen=True)
class ParamCount:
    """`embedding` is the embedding plus the head (once when tied); `non_embedding` is all the rest."""

    total: int
    embedding: int
    non_embedding: int


class Family:
    """What one model family looks like on disk and in its config. `where` in errors is config.json's path."""

    def __init__(self, data: FamilyData, where: str):
        self.data = data
        self.where = where

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def sites(self) -> Sites:
        return self.data.sites

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def dims(self, config: Config) -> Dims:
        """The model's sizes, with transformers' own defaults for absent and null fields.

        Raises CheckpointError for a missing or non-positive field and for sizes that transformers would refuse.
        """
        sizes: dict[str, int] = {}
        # hidden and heads first: the others may fall back on them
        for name in sorted(self.data.dims, key=lambda dim: dim not in ("hidden", "heads")):
            field = self.data.dims[name]
            value = config.get(field.field)
            fallback = field.null if field.field in config else field.absent
            if value is None and fallback is not None:
                value = fallback if isinstance(fallback, int) else _fallback(fallback, sizes)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                got = repr(value) if field.field in config else "no such field"
                raise CheckpointError(f"{self.where}: {field.field}", expected="a positive integer", got=got)
            sizes[name] = value
        dims = Dims(**sizes)
        if wrong := self.violations(dims):
            raise CheckpointError(f"{self.where}: the sizes do not fit together", got="; ".join(wrong))
        return dims

    def violations(self, dims: Dims) -> list[str]:
        """One sentence for each rule of the family that `dims` breaks; an empty list is a model that can be built."""
        sizes = asdict(dims)
        return [
            f"{rule.dim} ({sizes[rule.dim]}) is not a multiple of {rule.by} ({sizes[rule.by]}): {rule.why}"
            for rule in self.data.constraints
            if sizes[rule.dim] % sizes[rule.by]
        ]

    # -- tensors -------------------------------------------------------------------------------------------------------

    def tensors(self, config: Config) -> dict[str, TensorSpec]:
        """Every tensor on disk in file order: embedding, layers, final norm, head (absent when tied)."""
        dims = self.dims(config)
        before, layered, after = self._groups(config)
        found = {t.name: _spec(t, dims, None) for t in before}
        for layer in range(dims.layers):
            found |= {t.name.replace(LAYER, str(layer)): _spec(t, dims, layer) for t in layered}
        return found | {t.name: _spec(t, dims, None) for t in after}

    def layer_tensors(self, config: Config, layer: int) -> dict[str, TensorSpec]:
        """The tensors of one layer. Raises IndexError for a layer that the config does not have."""
        dims = self.dims(config)
        if not 0 <= layer < dims.layers:
            raise IndexError(f"layer {layer} of {dims.layers}")
        return {t.name.replace(LAYER, str(layer)): _spec(t, dims, layer) for t in self._groups(config)[1]}

    def outer_tensors(self, config: Config) -> dict[str, TensorSpec]:
        """The tensors outside the layers: embedding, final norm, head (absent when tied)."""
        dims = self.dims(config)
        before, _, after = self._groups(config)
        return {t.name: _spec(t, dims, None) for t in (*before, *after)}

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors start with, e.g. `model.layers.3.`"""
        return f"{self.sites.layers}.{layer}."

    def tied(self, config: Config) -> dict[str, str]:
        """Tensors that share another one's storage: `{"lm_head.weight": "model.embed_tokens.weight"}`, or none."""
        return {tie.tensor: tie.to for tie in self.data.ties if self._flag(config, tie.when)}

    def ignored(self) -> tuple[str, ...]:
        """Globs of names that old checkpoints carry and no model reads (rotary buffers)."""
        return self.data.ignored

    # -- figures -------------------------------------------------------------------------------------------------------

    def count_params(self, config: Config) -> ParamCount:
        outer = self.outer_tensors(config)
        embedding = sum(math.prod(spec.shape) for spec in outer.values() if spec.role in ("embed", "head"))
        rest = sum(math.prod(spec.shape) for spec in outer.values() if spec.role not in ("embed", "head"))
        one_layer = sum(math.prod(spec.shape) for spec in self.layer_tensors(config, 0).values())
        rest += one_layer * self.dims(config).layers
        return ParamCount(total=embedding + rest, embedding=embedding, non_embedding=rest)

    def kv_cache_bytes_per_token(self, config: Config, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that one token of context costs, all layers (full attention)."""
        dims = self.dims(config)
        return 2 * dims.layers * dims.kv_heads * dims.head_dim * bytes_per_value

    # -- the student ---------------------------------------------------------------------------------------------------

    def student_config(self, config: Config, dims: Dims, kept_layers: Sequence[int]) -> dict[str, Any]:
        """The teacher's config with the student's sizes written out and its per-layer fields cut to `kept_layers`.

        Raises CheckpointError for sizes the family refuses, ValueError for layers that are not an ascending selection
        of the teacher's or do not match `dims.layers`, or a head_dim or vocab that differs from the teacher's.
        """
        teacher = self.dims(config)
        kept = list(kept_layers)
        if kept != sorted(set(kept)) or len(kept) != dims.layers or not all(0 <= i < teacher.layers for i in kept):
            raise ValueError(f"kept_layers must be {dims.layers} ascending layers below {teacher.layers}, got {kept}")
        if (dims.head_dim, dims.vocab) != (teacher.head_dim, teacher.vocab):
            raise ValueError("head_dim and vocab never change")
        if wrong := self.violations(dims):
            raise CheckpointError(f"no {self.name} model has these sizes", got="; ".join(wrong))
        student = copy.deepcopy(dict(config))
        for name, size in asdict(dims).items():
            student[self.data.dims[name].field] = size  # type: ignore[index]
        for field in self.data.layer_lists:
            if student.get(field) is not None:
                student[field] = self._cut_list(student[field], field, teacher.layers, kept)
        if len(kept) < teacher.layers:
            for boundary in self.data.layer_boundaries:
                border = config.get(boundary.field, boundary.absent)
                student[boundary.field] = sum(layer < border for layer in kept)
        return student

    def _cut_list(self, values: Any, field: str, layers: int, kept: Sequence[int]) -> list[Any]:
        if not isinstance(values, list) or len(values) != layers:
            raise CheckpointError(f"{self.where}: {field}", expected=f"a list of {layers} entries", got=repr(values))
        return [values[i] for i in kept]

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


def _spec(template: TensorTemplate, dims: Dims, layer: int | None) -> TensorSpec:
    shape = tuple(dims.axis_size(axis) for axis in template.axes)
    return TensorSpec(shape=shape, axes=template.axes, layer=layer, role=template.role)


def _fallback(rule: str, sizes: Mapping[str, int]) -> int:
    return {"heads": sizes["heads"], "hidden // heads": sizes["hidden"] // sizes["heads"]}[rule]

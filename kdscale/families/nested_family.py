"""The language model inside a model of several modalities, seen as a family.

Configs and names of tensors are those of the whole model, so that whatever prunes, distils or exports a checkpoint
works on the language part in its place; every other tensor is carried over.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.families.dims import Dims
from kdscale.families.family import CarriedAxes, Family
from kdscale.families.layer_fields import Config
from kdscale.families.layer_kinds import Kinds
from kdscale.families.schema import FamilyData, LayerList
from kdscale.families.schema.nested_file import NestedData, Part
from kdscale.families.tensor_specs import TensorSpec

_TIED = "tie_word_embeddings"
_NOT_TEXT = ("model_type", "architectures", "transformers_version", "auto_map")  # of a flat config


class NestedFamily(Family):
    """A `Family` whose tensors and config lie inside another model's; `nested` is that model's file."""

    def __init__(self, data: FamilyData, where: str, config: Config, nested: NestedData):
        self.nested = nested
        data = data.model_copy(update={"constraints": (*data.constraints, *nested.constraints)})
        super().__init__(data, where, language_config(nested, config))
        self._hidden = self.dims(config).hidden

    # -- the language model's own view -----------------------------------------------------------------------------

    def language(self, config: Config) -> dict[str, Any]:
        """The language model's config, as its family has it, in the whole model's."""
        return language_config(self.nested, config)

    @property
    def language_names(self) -> dict[str, str]:
        """Beginning of a name on disk → of the parameter that transformers' language model has for it."""
        return {
            prefix: part.text for part in self.nested.parts if part.text for prefix in (part.prefix, *part.also)
        }  # fmt: skip

    @property
    def module_in_whole(self) -> str | None:
        return self.nested.module

    # -- the whole model's names and config ------------------------------------------------------------------------

    def dims(self, config: Config) -> Dims:
        return super().dims(self.language(config))

    def violations(self, dims: Dims) -> list[str]:
        wrong, fixed = super().violations(dims), self.nested.hidden_fixed
        if fixed is not None and dims.hidden != getattr(self, "_hidden", dims.hidden):
            wrong.append(f"hidden ({dims.hidden}) is not the teacher's {self._hidden}: {fixed}")
        return wrong

    def layer_kinds(self, config: Config) -> list[Kinds]:
        return super().layer_kinds(self.language(config))

    def layer_axes(self, config: Config, layer: int) -> frozenset[str]:
        return super().layer_axes(self.language(config), layer)

    def tensors(self, config: Config) -> dict[str, TensorSpec]:
        return self._renamed(super().tensors(self.language(config)))

    def layer_tensors(self, config: Config, layer: int) -> dict[str, TensorSpec]:
        return self._renamed(super().layer_tensors(self.language(config), layer))

    def outer_tensors(self, config: Config) -> dict[str, TensorSpec]:
        return self._renamed(super().outer_tensors(self.language(config)))

    def fixed_size(self, name: str, config: Config) -> int:
        return super().fixed_size(name, self.language(config))

    def layer_list(self, entry: LayerList, config: Config, layers: int) -> list[Any] | None:
        return super().layer_list(entry, self.language(config), layers)

    def tied(self, config: Config) -> dict[str, str]:
        tied = super().tied(self.language(config))
        return {self._on_disk(name): self._on_disk(other) for name, other in tied.items()}

    def ignored(self) -> tuple[str, ...]:
        return tuple(map(self._on_disk, super().ignored()))

    def parameter(self, name: str) -> str:
        own = next((p for p in self.nested.parts if p.text and name.startswith(p.prefix)), None)
        return super().parameter(name if own is None else f"{own.text}{name.removeprefix(own.prefix)}")

    def full_name(self, name: str) -> str:
        found = self._part_of(name)
        return name if found is None else f"{found[0].prefix}{name.removeprefix(found[1])}"

    def carried(self, name: str) -> bool:
        found = self._part_of(name)
        return (found is not None and found[0].text is None) or super().carried(name)

    def carried_axes(self, name: str) -> CarriedAxes:
        of_whole = (entry.axes for entry in self.nested.hidden if fnmatch.fnmatchcase(name, entry.tensors))
        return next(of_whole, ()) or super().carried_axes(name)

    def with_sizes(self, config: Config, dims: Dims) -> dict[str, Any]:
        return super().with_sizes(self.language(config), dims)

    def student_config(self, config: Config, dims: Dims, kept_layers: Sequence[int]) -> dict[str, Any]:
        before = self.language(config)
        after = super().student_config(before, dims, kept_layers)
        whole = copy.deepcopy(dict(config))
        text = whole.get(self.nested.text_config)
        if text is None:
            if before == config:  # the language model's own config
                return after
            text = whole
        for field in before.keys() - after.keys():
            text.pop(field, None)
        # what the family's config says otherwise than the file (text_values) is no change
        text |= {field: value for field, value in after.items() if field not in before or value != before[field]}
        if _TIED in before:
            whole[_TIED] = before[_TIED]
            text |= {_TIED: before[_TIED]} if _TIED in text else {}
        for path in self.nested.hidden_fields:
            _set(whole, path, dims.hidden)
        return whole

    def _renamed(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {self._on_disk(name): spec for name, spec in specs.items()}

    def _on_disk(self, name: str) -> str:
        part = next((part for part in self.nested.parts if part.text and name.startswith(part.text)), None)
        return name if part is None or part.text is None else f"{part.prefix}{name.removeprefix(part.text)}"

    def _part_of(self, name: str) -> tuple[Part, str] | None:
        """The part that a tensor belongs to, and the beginning of its name that says so: the longest that fits."""
        fitting = [
            (part, prefix)
            for part in self.nested.parts
            for prefix in (part.prefix, *part.also)
            if name.startswith(prefix)
        ]
        return max(fitting, key=lambda item: len(item[1]), default=None)


def language_config(nested: NestedData, config: Config) -> dict[str, Any]:
    """The language model's config; `config` itself where it is one already."""
    if config.get("model_type") not in nested.model_types:
        return dict(config)
    text = config.get(nested.text_config)
    if text is None and nested.flat:
        text = {field: value for field, value in config.items() if not isinstance(value, dict) or "rope" in field}
        text = {field: value for field, value in text.items() if field not in _NOT_TEXT}
    assert isinstance(text, dict), "text_type has checked it"
    text = copy.deepcopy(text)
    text["model_type"] = text_type(nested, config, "")
    text[_TIED] = config.get(_TIED, text.get(_TIED, nested.tied))
    for path, values in nested.text_values.items():
        holder, field = _holder(text, path)
        if holder is not None and isinstance(holder.get(field), str):
            holder[field] = values.get(holder[field], holder[field])
    for path in nested.text_without:
        holder, field = _holder(text, path)
        if holder is not None:
            holder.pop(field, None)
    return text


def text_type(nested: NestedData, config: Config, where: str) -> str:
    """The model_type of the family of the language model. Raises CheckpointError for a config that has none."""
    text = config.get(nested.text_config)
    if text is None and nested.flat:
        text = {}
    if not isinstance(text, dict):
        raise CheckpointError(f"{where}: {nested.text_config}", expected="an object", got=repr(text)[:100])
    said = text.get("model_type", nested.text_type)
    if not isinstance(said, str):
        raise CheckpointError(f"{where}: {nested.text_config}.model_type", expected="a name", got=repr(said)[:100])
    return nested.text_types.get(said, said)


def _holder(config: Any, path: str) -> tuple[dict[str, Any] | None, str]:
    """The object that has the field at the end of a dotted path, and the field; None where there is no such object."""
    *parts, field = path.split(".")
    for part in parts:
        config = config.get(part) if isinstance(config, dict) else None
    return (config if isinstance(config, dict) else None), field


def _set(config: dict[str, Any], path: str, value: int) -> None:
    holder, field = _holder(config, path)
    if holder is not None:
        holder[field] = value

"""The schema of a file about models of several modalities (`kdscale/families/nested/*.json`), checked strictly.

Such a model has a language model inside, of a family that has a file of its own. This file says where in config.json
and under which names of tensors the language model lies, and what of the rest depends on its hidden size.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import Field, model_validator

from kdscale.families.schema.axes import Name, Strict
from kdscale.families.schema.config_fields import Constraint


class Part(Strict):
    """Tensors whose names start with `prefix`, as transformers writes them; `also`: what older or newer files have.

    `text`: what stands for the prefix in the family's own names. Parts without it are carried over.
    """

    prefix: Name
    also: tuple[Name, ...] = Field(strict=False, default=())
    text: Name | None = None


class HiddenTensor(Strict):
    """Carried tensors that write into the language model's stream: which of their dimensions is `hidden`."""

    tensors: Name  # glob, in the names that transformers writes
    axes: tuple[Literal["hidden"] | None, ...] = Field(strict=False, min_length=1)  # null: a dimension that stays


class NestedData(Strict):
    """One file, with every reference to a part checked.

    `text_config` is the config field of the language model; with `flat` its fields may also lie in config.json itself,
    as older files have them. `text_types`: its model_type → the family whose model computes the same on text alone.
    `text_without` and `text_values` are what that family's config has not, or says otherwise, by dotted field.
    """

    name: Name
    model_types: tuple[Name, ...] = Field(strict=False, min_length=1)
    architectures: tuple[Name, ...] = Field(strict=False, min_length=1)
    text_config: Name = "text_config"
    flat: bool = False
    text_type: Name | None = None  # where the language model's config does not say
    text_types: dict[Name, Name] = Field(default={})
    text_without: tuple[Name, ...] = Field(strict=False, default=())
    text_values: dict[Name, dict[str, Any]] = Field(default={})
    tied: bool  # whether the head is tied where no config says
    module: Name  # the language model's module inside the whole transformers model
    parts: tuple[Part, ...] = Field(strict=False, min_length=1)
    hidden: tuple[HiddenTensor, ...] = Field(strict=False, default=())
    hidden_fields: tuple[Name, ...] = Field(strict=False, default=())  # config fields that repeat the hidden size
    hidden_fixed: Name | None = None  # why the hidden size cannot be cut
    constraints: tuple[Constraint, ...] = Field(strict=False, default=())  # beside those of the family

    @model_validator(mode="after")
    def _parts_are_told_apart(self) -> NestedData:
        prefixes = Counter(prefix for part in self.parts for prefix in (part.prefix, *part.also))
        if twice := sorted(prefix for prefix, count in prefixes.items() if count > 1):
            raise ValueError(f"parts repeat the prefix {', '.join(twice)}")
        if not any(part.text for part in self.parts):
            raise ValueError("no part has a text: where are the language model's tensors?")
        if bool(self.hidden) == bool(self.hidden_fixed):
            raise ValueError("needs either hidden (what is cut with the hidden size) or hidden_fixed (why it is not)")
        return self

"""What a family file says about config.json: sizes, flags, rules, and the fields that have an entry a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from kdscale.families.schema.axes import Axis, DimName, Expression, Name, Strict


class Narrowed(Strict):
    """A width that counts two thirds of the field, times a factor and up to the next multiple, while `when` is true.

    `factor` and `multiple_of` are config fields too. A student's config says the width itself, and `when` is false.
    """

    when: Name
    absent: bool
    factor: Name
    factor_absent: float
    multiple_of: Name
    multiple_absent: int


class DimField(Strict):
    """Where a dimension is in config.json, and what transformers takes when it is absent or null.

    Without a fallback a config without the field is refused. `always` replaces `field` where transformers has no field
    and always takes this; sizes that break the equation are then no model of the family. `counts`: the layer list whose
    length it is, which stands for an absent field and must agree with one that is there. `when`: a flag without which
    the size is 0, as in models without such layers.
    """

    field: Name | None = None
    aliases: tuple[Name, ...] = Field(strict=False, default=())  # other names of the field
    absent: int | Expression | None = None
    null: Expression | None = None
    always: Expression | None = None
    counts: Name | None = None
    narrowed: Narrowed | None = None
    when: Name | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DimField:
        if (self.field is None) == (self.always is None):
            raise ValueError("needs either field or always")
        return self

    def name_in(self, config: Mapping[str, Any]) -> str:
        """The field's name in this config (its first name when it has none of them)."""
        assert self.field is not None
        return next((name for name in (self.field, *self.aliases) if name in config), self.field)


class ProductField(Strict):
    """A config field that says a second time what dimensions multiply to: `equals`, divided by `over` if there is one.

    A student's config has it written out. `absent`: what transformers takes when it is not there; without it, and where
    it is null, it is then not compared.
    """

    field: Name
    equals: Axis
    over: DimName | None = None
    absent: int | None = None
    why: Name


class SizeField(Strict):
    """A size that some tensors have and that never changes in a student (positions of a learned embedding).

    Either one field with what is taken when it is absent (a number, or a dimension), or the sum of several.
    `only_with`: a boolean field without which it counts as absent, but in `layer_overrides`. `optional`: it may be 0 or
    null, and then it counts as 0, and tensors with it are not there. `begins_after`: a config field whose value is the
    last row that stands for no position of a text (padding's row). `of_layers`: its name in the entries of the family's
    `layer_overrides`, where newer configs say it. `entries`: instead of `field`, one whose entries are counted (the
    names of classes).
    """

    field: Name | None = None
    entries: Name | None = None
    absent: int | DimName | None = None
    only_with: Name | None = None
    sum: dict[Name, int] = Field(default={})
    optional: bool = False
    of_layers: Name | None = None
    begins_after: Name | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SizeField:
        named = self.field or self.entries
        if (
            (named is None) != (self.absent is None)
            or (named is None) != bool(self.sum)
            or (self.field is not None and self.entries is not None)
        ):
            raise ValueError("needs either field or entries, and absent, or sum")
        return self


class FlagField(Strict):
    """A boolean of config.json that decides whether some tensors exist; with `is_set` whether the field is neither null
    nor 0."""

    field: Name
    absent: bool
    is_set: bool = False


class ExpertGroups(Strict):
    """Groups of experts, of which a token is routed to some, and to experts of these alone (DeepSeek-V3).

    `field` is how many groups there are, `used` of how many a token may choose; absent or null is 1 and 1.
    """

    field: Name
    used: Name
    least: int = 1  # experts that a group must have


class Constraint(Strict):
    """`by` divides `dim`, or `dim` equals the product `equals`; else transformers refuses the config.

    `when_present`: dotted config fields; the constraint holds only for configs that have one of them.
    """

    dim: DimName
    by: Name | None = None
    equals: Axis | None = None
    when_present: tuple[Name, ...] = Field(strict=False, default=())
    why: Name

    @model_validator(mode="after")
    def _one_rule(self) -> Constraint:
        if (self.by is None) == (self.equals is None):
            raise ValueError("needs either by or equals")
        return self

    def applies(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is held to it."""
        return not self.when_present or any(_dotted(config, path) is not None for path in self.when_present)


class Requirement(Strict):
    """A config field whose other values make a model that this file does not describe.

    Absent is fine, unless `absent` is what transformers takes then.
    """

    field: Name
    one_of: tuple[Any, ...] = Field(strict=False, min_length=1)
    absent: Any = None
    why: Name


class Chosen(Strict):
    """Which configs a file is about where a model type has two files (mixtures and models without experts).

    Those whose `field` holds something, neither null, false nor 0 (`absent`: whether a missing field does), or with
    `entry` those whose layer list `field` has this entry; with `holds: false` all others.
    """

    field: Name
    holds: bool
    absent: bool = False
    entry: Name | None = None

    @property
    def question(self) -> tuple[Any, ...]:
        """What two files of one model type must have in common."""
        return self.field, self.absent, self.entry


class Pattern(Strict):
    """The list that an absent field stands for: `last` of every n layers, or `first` of them, else `others`."""

    every: Annotated[int, Field(ge=1)]
    every_field: Name | None = None  # config field that overrides `every`
    last: str | int | None = None
    first: str | int | None = None
    others: str | int

    @model_validator(mode="after")
    def _one_of_n(self) -> Pattern:
        if (self.last is None) == (self.first is None):
            raise ValueError("needs either last or first")
        return self

    def entries(self, layers: int, every: int) -> list[str | int]:
        """The list of so many layers, where the interval is `every`."""
        if self.first is not None:
            return [self.others if layer % every else self.first for layer in range(layers)]
        return [self.others if self.last is None or (layer + 1) % every else self.last for layer in range(layers)]


class Letters(Strict):
    """A text in older configs that says a layer list in one letter a layer: `MEM*-`."""

    field: Name
    of: dict[str, str]  # letter → entry


class LayerList(Strict):
    """A config list with one entry per layer. Without `absent` there is nothing to cut when the field is absent.

    `said_too` are fields that give the interval of the list a second time, for older readers. `letters`: a text that
    says it where the list is absent; a student whose layers are cut has the list instead. `last`: what transformers
    makes the last entry, whatever the config says, so that no student ends with a layer of another kind.
    `empty_is_absent`: an empty list says as little as none.
    """

    field: Name
    absent: Pattern | None = None
    said_too: tuple[Name, ...] = Field(strict=False, default=())
    letters: Letters | None = None
    last: Name | None = None
    empty_is_absent: bool = False


class LayerBoundary(Strict):
    """A config field that splits the layers in two: those before it and those from it on."""

    field: Name
    absent: int


class Window(Strict):
    """Sliding windows: in the layers that slide a query sees `field` positions, itself included (null: all of them).

    `only_with`: a boolean field without which no layer slides. `layers`: the layer list whose "sliding_attention"
    entries slide; where it is absent, the layers from the layer boundary on, or all. Without it all layers slide.
    """

    field: Name = "sliding_window"
    absent: int | None = None
    only_with: Name | None = None
    layers: Name | None = None


def _dotted(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config

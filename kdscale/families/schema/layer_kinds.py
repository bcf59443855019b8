"""What a family file says about layers of several kinds in one model (`layer_kinds`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kdscale.families.schema.axes import Name, Strict


class LayerCondition(Strict):
    """What one field of the config asks of a layer's number, counted from 0.

    `every`: the number plus one is a multiple of the field. `from`, `to`: the number is at least, or at most, the field
    (to −1: all layers). `last`: it is one of so many at the end. `in`, `not_in`: the field lists layer numbers; absent
    or null it asks for nothing. `absent` stands for a missing or null number. `unless`: the condition counts only where
    this other field is absent or null.
    """

    rule: Literal["every", "from", "to", "last", "in", "not_in"]
    field: Name
    absent: int | None = None
    unless: Name | None = None

    @model_validator(mode="after")
    def _number_has_a_default(self) -> LayerCondition:
        if (self.rule in ("in", "not_in")) != (self.absent is None):
            raise ValueError("absent: needed for every, from, to and last, and of no use for in and not_in")
        return self


class LayerKinds(Strict):
    """Which of several kinds each layer is of: one question, such as dense or mixture, or attention or state space.

    Either `field`, one of the family's `layer_lists`, has an entry a layer, and `kinds` gives the kind of each entry;
    or a layer is of `kind` where all conditions in `where` hold, and of `otherwise` elsewhere. With `first` the first
    layer alone is of `kind`, whatever the config says (ModernBERT's has no norm before its attention).
    """

    field: Name | None = None
    kinds: dict[str, Name] = Field(default={})
    kind: Name | None = None
    otherwise: Name | None = None
    where: tuple[LayerCondition, ...] = Field(strict=False, default=())
    first: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> LayerKinds:
        listed, counted = (self.field, self.kinds), (self.kind, self.otherwise, self.where or self.first)
        if not (all(listed) and not any(counted)) and not (all(counted) and not any(listed)):
            raise ValueError("needs either field and kinds, or kind, otherwise and where (or first)")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All kinds that a layer can be of, by this question."""
        return tuple(dict.fromkeys(self.kinds.values())) or (str(self.kind), str(self.otherwise))

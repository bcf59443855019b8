"""What every section of the config is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kdscale.units import parse_count

Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """Strict and frozen: an unknown key or another type is an error, never a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, frozen=True)

"""What every section of the config is made of."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kdscale.units import parse_count

Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """Strict and frozen: an unknown key or another type is an error, never a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, frozen=True)


def explain_error(item: Any, model: type[BaseModel]) -> str:
    """One line for one pydantic error of `model`: field, what was expected, what came, and the nearest known key."""
    location = [str(part) for part in item["loc"]]
    field = ".".join(location) or "config"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(model, location[:-1]), n=1)
        return f"{field}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")
    if item["type"] == "missing":
        return f"{field}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = item["input"]
    came = "" if isinstance(shown, dict | BaseModel) else f", got {shown!r} ({type(shown).__name__})"
    return f"{field}: {message}{came}"


def _known_keys(root: type[BaseModel], location: Sequence[str]) -> list[str]:
    model: Any = root
    for part in location:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        inner = field.annotation
        args = [arg for arg in getattr(inner, "__args__", ()) if isinstance(arg, type) and issubclass(arg, BaseModel)]
        model = args[0] if args else inner
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)

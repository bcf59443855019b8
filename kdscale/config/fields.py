"""What every section of the config is made of."""

from __future__ import annotations

import difflib
import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from kdscale.units import parse_count

# Every number has a finite range, so that no typing error becomes a hang, an overflow or an infinite learning rate.
MOST = 10**15
Count = Annotated[int, Field(gt=0, le=MOST), BeforeValidator(parse_count)]  # of tokens, bytes, parameters, steps
Length = Annotated[int, Field(gt=0, le=2**24), BeforeValidator(parse_count)]  # positions, sizes of a model
Few = Annotated[int, Field(gt=0, le=2**16), BeforeValidator(parse_count)]  # processes, sequences, checkpoints
Seconds = Annotated[float, Field(ge=0.0, le=30 * 86_400.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
GgufType = Literal["f32", "bf16", "f16", "q8_0", "q4_0"]  # of the matrices in a GGUF file


class Section(BaseModel):
    """Strict and frozen: an unknown key or another type is an error, never a guess."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_default=True, frozen=True, allow_inf_nan=False, str_max_length=4096
    )

    @field_validator("*")
    @classmethod
    def _no_control_characters(cls, value: Any, info: ValidationInfo) -> Any:
        """Texts reach paths, scripts and terminals, where a newline or an escape sequence means something else."""
        allowed = "\n\t" if info.field_name in ("prompts", "system") else ""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and any(
                unicodedata.category(character) in ("Cc", "Cs") and character not in allowed for character in text
            ):
                raise ValueError("expected text without control characters")
        return value


Entry = TypeVar("Entry", bound=Section)


def named_entry(entry: Any, table: Mapping[str, type[Entry]], base: type[Entry], what: str) -> Entry:
    """Settings of the class that a mapping's `name` chooses in `table`; what is a `base` already stays as it is."""
    if isinstance(entry, base):
        return entry
    known = ", ".join(table)
    if not isinstance(entry, dict) or "name" not in entry:
        raise ValueError(f"expected a mapping with the name of {what} ({known})")
    settings = table.get(str(entry["name"]))
    if settings is None:
        raise ValueError(f"name: expected one of {known}, got {entry['name']!r}")
    for key in entry:
        if key not in settings.model_fields and (near := difflib.get_close_matches(key, settings.model_fields, n=1)):
            raise ValueError(f"{key}: unknown key (did you mean {near[0]!r}?)")
    return settings.model_validate(entry)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlevel = 3
_MOST_PROBLEMS = 30  # lines of one message
# A check of a whole section begins its message with the field that it is about: `urls: ...`, `micro_batch (3) must ...`
_OWN_FIELD = re.compile(r"[a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*(?=: | \()")


def shown(value: Any) -> str:
    """A value for a message, cut to a length that can be read."""
    try:
        return _short.repr(value)[:400]
    except ValueError:  # an integer of more digits than Python converts
        return "a number too long to show"


def explain_errors(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each problem that pydantic found in a `model`, of the first few if there are many."""
    items = error.errors(include_url=False, include_context=False)
    lines = [explain_error(item, model) for item in items[:_MOST_PROBLEMS]]
    return [*lines, f"and {len(items) - _MOST_PROBLEMS:,} more"] if len(items) > _MOST_PROBLEMS else lines


def explain_error(item: Any, model: type[BaseModel]) -> str:
    """One line for one pydantic error of `model`: field, what was expected, what came, and the nearest known key."""
    location = [str(part)[:80] for part in item["loc"]]
    field = ".".join(location)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(model, location[:-1]), n=1)
        return f"{field}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")
    if item["type"] == "missing":
        return f"{field}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")[:2000]
    message = message[:1].lower() + message[1:]
    value = item["input"]
    came = "" if isinstance(value, dict | BaseModel) else f", got {shown(value)} ({type(value).__name__})"
    if item["type"] == "value_error" and _OWN_FIELD.match(message):
        return f"{field}.{message}" if field else message
    return f"{field or 'config'}: {message}{came}"


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

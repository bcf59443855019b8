"""Types of columns that take any text: run folders, names and words of programs come from others."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import JSON, String, Text
from sqlalchemy.types import TypeDecorator

# Postgres takes no NUL, in no text and in no JSON; halves of surrogate pairs (how Python reads what is not UTF-8) have
# no place in any database's UTF-8.
_REFUSED = re.compile("[\x00\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def storable(text: str) -> str:
    """A text as every database keeps it."""
    return _REFUSED.sub(_REPLACEMENT, text)


class Words(TypeDecorator[str]):
    """A text for people, cut to `length` characters; of any length without one."""

    impl: Any = Text
    cache_ok = True

    def __init__(self, length: int | None = None):
        super().__init__()
        self.length = length
        self.impl = Text() if length is None else String(length)

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """The text as it is kept."""
        return None if value is None else storable(value)[: self.length]

    def copy(self, **_: Any) -> Words:
        """Another of the same length."""
        return Words(self.length)


class Word(TypeDecorator[str]):
    """A name that must stay whole, such as an id: never cut, so that no longer one is taken for it."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """The text as it is kept."""
        return None if value is None else storable(value)


class Json(TypeDecorator[Any]):
    """A JSON value; NaN and infinities, which JSON has not, become texts."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        """The value as it is kept."""
        return _storable_json(value)


def _storable_json(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)
    if isinstance(value, dict):
        return {storable(str(key)): _storable_json(item) for key, item in value.items()}
    return [_storable_json(item) for item in value] if isinstance(value, list | tuple) else value

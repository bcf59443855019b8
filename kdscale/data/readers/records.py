"""What a record holds: its text, or a chat's messages, and where it says that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdscale.config.data import SourceConfig
from kdscale.errors import DataError

_LONGEST_LABEL = 200  # characters of it are kept


def content_of(record: dict[str, Any], source: SourceConfig, where: str) -> Any:
    """What the source's field holds. Raises DataError where the record has no such field."""
    if source.field_name not in record:
        raise without_field(where, "field", sorted(record), source)
    return record[source.field_name]


def without_field(where: str, kind: str, names: Sequence[str], source: SourceConfig) -> DataError:
    """The error for a record or a table that has the fields or columns (`kind`) `names`, and not the source's."""
    hint = f"set `field` of this source to the {kind} that holds the text"
    if not source.chat and {"messages", "conversations"} & set(names):
        hint = "set `chat: true` for this source, which then learns the answers of each conversation"
    return DataError(f"{where} has no {kind} {source.field_name!r}", got=f"{kind}s {names}"[:400], hint=hint)


def checked_text(text: Any, what: str) -> str:
    """`text`, which must be one. Raises DataError."""
    if not isinstance(text, str):
        raise DataError(f"{what}", expected="a string", got=type(text).__name__)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        raise DataError(f"{what} is not valid Unicode", got=str(error)) from error
    return text


def class_of(record: dict[str, Any], source: SourceConfig, where: str) -> int | str | None:
    """What the record's `class_field` says. Raises DataError for what is neither a number nor a name."""
    value = None if source.class_field is None else record.get(source.class_field)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise DataError(
            f"{where}, field {source.class_field!r}",
            expected="the number or the name of a class",
            got=repr(value)[:100],
        )
    return value


def label_of(record: dict[str, Any], source: SourceConfig, default: str) -> str:
    """What the record's `source_field` says, else `default`."""
    label = record.get(source.source_field) if source.source_field is not None else None
    if not isinstance(label, str) or not label:
        return default
    return label[:_LONGEST_LABEL].encode("utf-8", "replace").decode()  # JSON may escape half of a surrogate pair

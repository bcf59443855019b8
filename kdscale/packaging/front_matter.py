"""The YAML at the head of a model card, between two lines of dashes, which model hubs read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kdscale.errors import FileError

_FENCE = "---"
_WIDTH = 10_000  # no folded lines


def split(text: str, where: str) -> tuple[dict[str, Any], str]:
    """A card's front matter and the text after it; without front matter {} and the whole text.

    Comments of the YAML stay with the mapping and are written back by `join`. Raises FileError, naming `where`, for
    what is not a mapping in YAML.
    """
    lines = text.splitlines(keepends=True)
    if not lines or lines[0].strip() != _FENCE:
        return {}, text
    end = next((at for at, line in enumerate(lines[1:], 1) if line.strip() == _FENCE), None)
    if end is None:
        raise FileError(f"{where}: front matter", expected=f"a line {_FENCE} that ends it", got="none")
    try:
        # a reader of its own: pure Python, and the round-trip type builds no objects of the document's choosing
        fields = YAML(typ="rt", pure=True).load("".join(lines[1:end]))
    except (YAMLError, ValueError, RecursionError) as error:
        got = " ".join(str(error).split())[:300]
        raise FileError(f"{where}: front matter", expected="YAML", got=got) from error
    if fields is not None and not isinstance(fields, dict):
        raise FileError(f"{where}: front matter", expected="fields with values", got=type(fields).__name__)
    return fields or {}, "".join(lines[end + 1 :])


def join(fields: Mapping[str, Any], text: str) -> str:
    """A card of this front matter and this text."""
    yaml = YAML(typ="rt", pure=True)
    yaml.width = _WIDTH
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    stream = io.StringIO()
    yaml.dump(fields, stream)
    return f"{_FENCE}\n{stream.getvalue()}{_FENCE}\n{text}"

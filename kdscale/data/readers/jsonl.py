"""JSON lines, plain or compressed with gzip: a record on each line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdscale.config.data import SourceConfig
from kdscale.data.readers.text import numbered_lines
from kdscale.errors import DataError


def read(name: str, source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file.

    Raises DataError, with the line, for what is no JSON object, and for a damaged gzip file.
    """
    path, number = Path(name), 0
    opener: Any = gzip.open if name.endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:
            for number, line in numbered_lines(stream, path):
                where = f"{path} line {number}"
                yield where, _parsed(line, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is a damaged gzip file", got=f"{error} (after line {number})", hint="copy or download it again"
        ) from error


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise DataError(f"{where} is not valid JSON", got=str(error)) from error
    if not isinstance(record, dict):
        raise DataError(where, expected="a JSON object", got=type(record).__name__)
    return record

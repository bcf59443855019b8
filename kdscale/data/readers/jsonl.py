"""JSON lines, plain or compressed with gzip: a record on each line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kdscale.config.data import SourceConfig
from kdscale.data.readers.text import BOM, not_utf8
from kdscale.errors import DataError

_MAX_RECORD_BYTES = 64 << 20


def read(name: str, source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file.

    Raises DataError, with the line, for what is no JSON object, and for a damaged gzip file.
    """
    path, number = Path(name), 0
    opener: Any = gzip.open if name.endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:
            lines: IO[bytes] = stream
            # not `for raw in lines`: a file without newlines, or a small gzip file of one, would be read whole
            while raw := lines.readline(_MAX_RECORD_BYTES + 1):
                number += 1
                if len(raw) > _MAX_RECORD_BYTES:
                    expected = f"at most {_MAX_RECORD_BYTES:,} bytes a line"
                    hint = "is each record on a line of its own? Cut longer texts into several records"
                    raise DataError(f"{path} line {number} is too long", expected=expected, hint=hint)
                line = raw.removeprefix(BOM) if number == 1 else raw
                if line.strip():
                    yield f"{path} line {number}", _parse_line(line, path, number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is a damaged gzip file", got=f"{error} (after line {number})", hint="copy or download it again"
        ) from error


def _parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, number, error) from error
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise DataError(f"{path} line {number} is not valid JSON", got=str(error)) from error
    if not isinstance(record, dict):
        raise DataError(f"{path} line {number}", expected="a JSON object", got=type(record).__name__)
    return record

"""Plain text files: one document each, or several where one would be too long."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kdscale.config.data import SourceConfig
from kdscale.errors import DataError

_BOM = b"\xef\xbb\xbf"
DOCUMENT_CHARS = 1 << 16  # a document has at least so many characters, and at most twice as many
_CUTS = (r"\n[ \t\r]*\n", r"\n", r"\s")  # where a text may be cut, the best first
_BLOCK_BYTES = 1 << 20
_MAX_LINE_BYTES = 64 << 20


def read(name: str, source: SourceConfig) -> Iterator[tuple[str, str]]:
    """The documents of a file; together they are its text, whose newlines stay as they are.

    Raises DataError, with the line, for what is not UTF-8.
    """
    text = ""
    for block in _decoded_blocks(Path(name)):
        text += block
        while (end := _cut_position(text)) is not None:
            if text[:end].strip():
                yield name, text[:end]
            text = text[end:]
    if text.strip():
        yield name, text


def _cut_position(text: str) -> int | None:
    """Where the document at the beginning of `text` ends; None while it is too short to say."""
    if len(text) < 2 * DOCUMENT_CHARS:
        return None
    for pattern in _CUTS:
        match = re.compile(pattern).search(text, DOCUMENT_CHARS, 2 * DOCUMENT_CHARS)
        if match is not None:
            return match.end()
    return 2 * DOCUMENT_CHARS


def _decoded_blocks(path: Path) -> Iterator[str]:
    decoder, lines = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as stream:
        raw = stream.read(_BLOCK_BYTES).removeprefix(_BOM)
        while True:
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, lines + error.object.count(b"\n", 0, error.start) + 1, error) from error
            if not raw:
                return
            lines += raw.count(b"\n")
            raw = stream.read(_BLOCK_BYTES)


def numbered_lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """The lines of an open file with their numbers, from 1 on; empty ones are left out.

    Raises DataError, with the line, for one that is too long or not UTF-8.
    """
    number = 0
    # not `for raw in stream`: a file without newlines, or a small gzip file of one, would be read whole
    while raw := stream.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > _MAX_LINE_BYTES:
            expected = f"at most {_MAX_LINE_BYTES:,} bytes a line"
            hint = "is each record on a line of its own? Cut longer texts into several records"
            raise DataError(f"{path} line {number} is too long", expected=expected, hint=hint)
        try:
            line = (raw.removeprefix(_BOM) if number == 1 else raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, error) from error
        if line.strip():
            yield number, line


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    """The error for bytes in line `line` that are not UTF-8."""
    with path.open("rb") as stream:
        encoding = "utf-16" if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
    return DataError(
        f"{path} line {line} is not UTF-8 text",
        got=f"byte 0x{error.object[error.start]:02x} ({error.reason})",
        hint=f"convert it, e.g. iconv -f {encoding} -t utf-8 {path}",
    )

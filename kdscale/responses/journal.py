"""The journal of answers: every answer is on the disk before the next question is asked, and none is asked for twice.

A journal is a folder of JSON lines files, one for each process that writes. A record is one line, appended and flushed
to the disk before it counts. A kill can leave half a line at the end of a file, which its writer cuts off next time.
Records are never changed or deleted: they were paid for, whatever the settings are now.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdscale.errors import FileError, RunFolderError
from kdscale.files import explain_os_errors, fsync_dir, parse_json, sha256_json
from kdscale_launch.watchdog import beat

_MAX_LINE = 1 << 30


def key_of(*parts: Any) -> str:
    """The key under which the answer to a question is kept: a hash of everything that the answer depends on."""
    return sha256_json(list(parts))


@dataclass(frozen=True)
class Usage:
    """Tokens that were read and written."""

    prompt_tokens: int = 0
    answer_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.answer_tokens + other.answer_tokens)

    @property
    def total(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.answer_tokens


class _Place(NamedTuple):
    file: int
    offset: int
    size: int


class Journal:
    """The records of all writers, and the file of one of them, open for more; without a writer, to be read alone.

    Records are read from the disk when they are asked for: only their keys are in memory. What other writers add after
    the journal was opened is not seen.
    """

    def __init__(self, folder: Path, writer: str | None = None, say: Callable[[str], None] = lambda message: None):
        """`writer` names this process's file. Raises RunFolderError for a folder that cannot be written."""
        self._folder, self.usage = folder, Usage()
        self._places: dict[bytes, _Place] = {}
        self._lock = threading.Lock()
        self._own = None if writer is None else folder / f"{writer}.jsonl"
        self._files = [path for path in sorted(folder.glob("*.jsonl")) if path != self._own]
        for number in range(len(self._files)):
            self._read(number, say)
        if self._own is not None:
            with explain_os_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._stream = os.open(self._own, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
                self._files.append(self._own)
                self._end = self._read(len(self._files) - 1, say)
                os.ftruncate(self._stream, self._end)
                fsync_dir(folder)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bytes.fromhex(key) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any]:
        """The record of a key that is there."""
        place = self._places[bytes.fromhex(key)]
        with self._files[place.file].open("rb") as stream:
            stream.seek(place.offset)
            line = stream.read(place.size)
        return _record(line)

    def append(self, key: str, **content: Any) -> None:
        """Add a record and return when it is on the disk. Safe to call from several threads."""
        line = json.dumps({"key": key, **content}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._lock, explain_os_errors(self._folder):
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._stream, line[written:])
                os.fsync(self._stream)
            except OSError:
                os.ftruncate(self._stream, self._end)  # half a line would spoil the next one
                raise
            self._note(key, {**content}, _Place(len(self._files) - 1, self._end, len(line)))
            self._end += len(line)

    def close(self) -> None:
        """Let go of the file."""
        if self._own is not None:
            os.close(self._stream)

    def _read(self, number: int, say: Callable[[str], None]) -> int:
        """Note the records of a file; returns where its whole lines end."""
        path, end = self._files[number], 0
        for count, (offset, line) in enumerate(_whole_lines(path), 1):
            end = offset + len(line)
            try:
                record = _record(line)
            except FileError as error:
                say(f"warning: {path.name} line {count} is damaged, and its question is asked again: {error.what}")
                continue
            self._note(record["key"], record, _Place(number, offset, len(line)))
            beat()
        return end

    def _note(self, key: str, content: Mapping[str, Any], place: _Place) -> None:
        self._places.setdefault(bytes.fromhex(key), place)
        self.usage += usage_of(content)


def usage_of(record: Mapping[str, Any]) -> Usage:
    """The tokens that a record says it took."""
    counts = (record.get("prompt_tokens", 0), record.get("answer_tokens", 0))
    return Usage(*(count if isinstance(count, int) and count > 0 else 0 for count in counts))


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each line that ends; the half line that a kill left is passed over."""
    if path.is_symlink() or not path.is_file():
        raise RunFolderError(f"{path} is not a regular file", hint="move it away")
    with path.open("rb") as stream:
        offset = 0
        while (line := stream.readline(_MAX_LINE)).endswith(b"\n"):
            yield offset, line
            offset += len(line)


def _record(line: bytes) -> dict[str, Any]:
    """Raises FileError for a line that is no record."""
    try:
        record: dict[str, Any] = parse_json(line.decode("utf-8"), "record", expect=dict)
        key = record.get("key")
        if isinstance(key, str) and len(bytes.fromhex(key)) == 32:
            return record
    except ValueError as error:  # not UTF-8, or no hexadecimal key
        raise FileError("record", got=str(error)[:200]) from error
    raise FileError("record", expected="a key", got=repr(key)[:80])

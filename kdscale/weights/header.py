"""Reads and checks safetensors headers without touching the tensors.

Format of a file: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes back to back. The
library checks much of this when it opens a file; checking it here first gives errors that say what is wrong and what
to do, before any work, and gives the offsets to read from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kdscale.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one file; `begin` and `end` are byte offsets from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class DuplicateKeyError(ValueError):
    """A JSON object that has the same key twice: one of the two values would be lost silently."""


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for json that refuses repeated keys with DuplicateKeyError."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise DuplicateKeyError(f"{key!r} appears twice")
        values[key] = value
    return values


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the entries of one safetensors file, in file order.

    Raises CheckpointError when the file is truncated, its header damaged, an offset outside the file, tensors overlap
    or leave holes, or a dtype is one that kdscale does not prune.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        raw, start = _read_json_bytes(path, stream, size)
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
    except DuplicateKeyError as error:
        raise CheckpointError(f"{path}: the header names a tensor twice", got=str(error), hint=_AGAIN) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON", got=str(error), hint=_AGAIN) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object", got=type(header).__name__, hint=_AGAIN)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    _check_offsets(path, entries, start, size)
    return entries


def _read_json_bytes(path: Path, stream: BinaryIO, size: int) -> tuple[bytes, int]:
    if size < LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file", expected="at least 8 bytes", got=f"{size} bytes", hint=_AGAIN
        )
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    if length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file",
            expected=f"a header of at most {min(size - LENGTH_BYTES, MAX_HEADER_BYTES):,} bytes",
            got=f"a header length of {length:,} bytes",
            hint=_AGAIN,
        )
    return stream.read(length), LENGTH_BYTES + length


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    where = f"{path}: tensor {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(where, expected="dtype, shape and data_offsets", got=repr(value), hint=_AGAIN)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            where,
            expected="dtype " + ", ".join(DTYPE_BYTES),
            got=repr(dtype),
            hint="quantised and integer checkpoints cannot be pruned: use the original float checkpoint",
        )
    if not _is_counts(shape):
        raise CheckpointError(where, expected="a shape of non-negative integers", got=repr(shape), hint=_AGAIN)
    if not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(where, expected="two byte offsets", got=repr(offsets), hint=_AGAIN)
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            where, expected=f"{expected:,} bytes for {dtype}{shape}", got=f"{end - begin:,} bytes", hint=_AGAIN
        )
    return TensorEntry(file=path, dtype=dtype, shape=tuple(shape), begin=start + begin, end=start + end)


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_offsets(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """Check that the tensors fill the file exactly: nothing beyond its end, no overlap, no hole."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends beyond the file",
                expected=f"at least {entry.end:,} bytes",
                got=f"{size:,} bytes",
                hint=_AGAIN,
            )
        if entry.begin != at:
            raise CheckpointError(
                f"{path}: tensor {name} overlaps another one or leaves a hole",
                expected=f"its bytes to start at {at:,}",
                got=f"{entry.begin:,}",
                hint=_AGAIN,
            )
        at = entry.end
    if at != size:
        raise CheckpointError(
            f"{path} has bytes that belong to no tensor", expected=f"{at:,} bytes", got=f"{size:,} bytes", hint=_AGAIN
        )

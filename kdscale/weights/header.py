"""Reads and checks safetensors headers without touching the tensors.

Format of a file: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes back to back.
Most of what the library checks when it opens a file is checked here first, which gives errors that say what is wrong
and what to do, before any work, and the offsets to read from. Then the library is asked too, so that no file is read
here that nothing else could open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from kdscale.errors import CheckpointError
from kdscale.files import parse_json

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_DIMENSIONS, _MAX_COUNT = 8, 1 << 60
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of weights that can be read and pruned
_POSITIONS, _POSITIONS_DTYPE, _POSITIONS_BYTES = "position_ids", "I64", 8  # buffers of old BERTs, which no model reads
QUANTIZED_BYTES = {"I64": 8, "I32": 4, "F8_E4M3": 1}  # of what quantised weights are written as
# what quantised checkpoints of others hold besides
PACKED_BYTES = DTYPE_BYTES | QUANTIZED_BYTES | {"I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E5M2": 1, "F8_E8M0": 1}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one file; `begin` and `end` are byte offsets from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin

    def piece(self, shape: tuple[int, ...], first: int) -> TensorEntry:
        """The values from number `first` on, in storage order, as a tensor of `shape`."""
        width = PACKED_BYTES[self.dtype]
        begin = self.begin + first * width
        return replace(self, shape=shape, begin=begin, end=begin + math.prod(shape) * width)


def read_header(path: Path, dtypes: Mapping[str, int] = DTYPE_BYTES) -> dict[str, TensorEntry]:
    """Read the entries of one safetensors file, in file order.

    `dtypes`: bytes a value of the dtypes that may occur. Raises CheckpointError when the file is truncated, its header
    damaged, an offset outside the file, tensors overlap or leave holes, a dtype is another one, or the safetensors
    library cannot open the file. Buffers with the numbers of positions, which are no
    weights, are left out.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        raw, start = _read_json_bytes(path, stream, size)
    try:
        # as text: from bytes, the json module would guess UTF-16 and UTF-32 too and skip a byte order mark
        header = parse_json(raw.decode("utf-8"), f"{path}: the header", CheckpointError, expect=dict, unique=True)
    except UnicodeDecodeError as error:
        raise _damaged(f"{path}: the header is not JSON in UTF-8", None, str(error)[:200]) from error
    except CheckpointError as error:
        raise _damaged(error.what, error.expected, error.got) from error
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, start, dtypes) for name, value in header.items()}
    _check_offsets(path, entries, start, size)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _damaged(f"{path}: the safetensors library cannot open it", None, str(error)[:200]) from error
    return {name: entry for name, entry in entries.items() if not _counts_positions(name, entry.dtype)}


def _counts_positions(name: str, dtype: object) -> bool:
    """Whether a tensor is the buffer of old BERTs that no model reads."""
    return dtype == _POSITIONS_DTYPE and name.endswith(_POSITIONS)


def _damaged(what: str, expected: str | None, got: str | None) -> CheckpointError:
    return CheckpointError(what, expected=expected, got=got, hint="download or copy the file again")


def _read_json_bytes(path: Path, stream: BinaryIO, size: int) -> tuple[bytes, int]:
    """The header's JSON, and where the tensors' bytes begin."""
    if size < LENGTH_BYTES:
        raise _damaged(f"{path} is not a safetensors file", "at least 8 bytes", f"{size} bytes")
    length, limit = int.from_bytes(stream.read(LENGTH_BYTES), "little"), min(size - LENGTH_BYTES, MAX_HEADER_BYTES)
    if length > limit:
        what = f"{path} is damaged or not a safetensors file"
        raise _damaged(what, f"a header of at most {limit:,} bytes", f"a header length of {length:,} bytes")
    return stream.read(length), LENGTH_BYTES + length


def _entry(path: Path, name: str, value: Any, start: int, dtypes: Mapping[str, int]) -> TensorEntry:
    where = f"{path}: tensor {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(where, "dtype, shape and data_offsets", repr(value)[:200])
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    counts_positions = _counts_positions(name, dtype)
    if not isinstance(dtype, str) or (dtype not in dtypes and not counts_positions):
        hint = (
            "quantised weights are read where quantization_config in config.json says how they are stored; integer "
            "checkpoints cannot be pruned: use the original float checkpoint"
        )
        raise CheckpointError(where, expected="dtype " + ", ".join(dtypes), got=repr(dtype)[:200], hint=hint)
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _damaged(where, f"a shape of at most {_MAX_DIMENSIONS} non-negative integers", repr(shape)[:200])
    if not _is_counts(offsets) or len(offsets) != 2:
        raise _damaged(where, "two byte offsets", repr(offsets)[:200])
    begin, end = offsets
    expected = math.prod(shape) * (_POSITIONS_BYTES if counts_positions else dtypes[dtype])
    if end - begin != expected:
        raise _damaged(where, f"{expected:,} bytes for {dtype}{shape}", f"{end - begin:,} bytes")
    return TensorEntry(file=path, dtype=dtype, shape=tuple(shape), begin=start + begin, end=start + end)


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_COUNT for value in values)


def _check_offsets(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """Check that the tensors fill the file exactly: nothing beyond its end, no overlap, no hole."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            what = f"{path} is truncated: tensor {name} ends beyond the file"
            raise _damaged(what, f"at least {entry.end:,} bytes", f"{size:,} bytes")
        if entry.begin != at:
            what = f"{path}: tensor {name} overlaps another one or leaves a hole"
            raise _damaged(what, f"its bytes to start at {at:,}", f"{entry.begin:,}")
        at = entry.end
    if at != size:
        raise _damaged(f"{path} has bytes that belong to no tensor", f"{at:,} bytes", f"{size:,} bytes")

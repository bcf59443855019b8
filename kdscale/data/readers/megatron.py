"""Megatron's indexed data sets: token ids in a `.bin` file, and in an `.idx` file where sequences and documents begin.

.idx   9 bytes of magic, version (uint64, 1), code of the ids' type (uint8), S sequences and D + 1 bounds (uint64),
       tokens of each sequence (S int32), its first byte in the .bin file (S int64),
       first sequence of each document and S at last (D + 1 int64); multimodal ones go on with S modes (int8)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kdscale.config.data import SourceConfig
from kdscale.errors import DataError
from kdscale.files import atomic_path

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # those of whole numbers
_FEW_IDS = 65_500  # below which Megatron writes uint16
_BLOCK_TOKENS = 1 << 22  # that are written at once


def read(name: str, source: SourceConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The documents of a data set, by its .idx file: token ids, int64, memory-mapped until they are asked for.

    Raises DataError for an index that is damaged or cut short, or that does not fit the .bin file, and for ids that
    are no whole numbers from 0 on.
    """
    path = Path(name)
    dtype, lengths_S, first_bytes_S, bounds_D1 = _index(path)
    data_path = path.with_suffix(".bin")
    if not data_path.is_file():
        raise DataError(f"{name} has no data", expected=f"{data_path.name} beside it", hint="copy both files")
    size = data_path.stat().st_size
    ends_S = first_bytes_S + lengths_S.astype(np.int64) * dtype.itemsize
    if lengths_S.size and (lengths_S.min() < 0 or first_bytes_S.min() < 0 or ends_S.max() > size):
        raise DataError(
            f"{name} does not belong to {data_path.name}",
            expected=f"sequences within its {size:,} bytes",
            got="one beyond its end, or of a negative length",
            hint="copy both files again",
        )
    data = np.memmap(data_path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    for number, (first, last) in enumerate(zip(bounds_D1[:-1].tolist(), bounds_D1[1:].tolist(), strict=True)):
        parts = [data[first_bytes_S[i] : ends_S[i]].view(dtype) for i in range(first, last)]
        ids_T = np.concatenate([*parts, np.zeros(0, dtype)]).astype(np.int64)
        if ids_T.size and ids_T.min() < 0:
            raise DataError(f"{name} document {number}", expected="token ids from 0 on", got=str(ids_T.min()))
        yield f"{name} document {number}", ids_T


def _index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The type of the ids, each sequence's length and first byte, each document's first sequence and their number."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        got = f"{header[:9]!r}, {size:,} bytes"
        hint = "name the .idx file of a data set that Megatron's preprocess_data wrote"
        raise DataError(
            f"{path} is no Megatron index", expected=f"a file that begins with {MAGIC!r}", got=got, hint=hint
        )
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES:
        expected = f"version 1 and a type of whole numbers (codes {', '.join(map(str, _TYPES))})"
        raise DataError(f"{path} cannot be read", expected=expected, got=f"version {version}, code {code}")
    expected_size = _HEADER.size + 12 * sequences + 8 * bounds
    if size != expected_size:
        multimodal = size == expected_size + sequences
        raise DataError(
            f"{path} is " + ("multimodal" if multimodal else "damaged or cut short"),
            expected=f"{expected_size:,} bytes of {sequences:,} sequences and {bounds:,} bounds",
            got=f"{size:,}",
            hint="only text can be read" if multimodal else "copy it again",
        )
    columns, offset = [], _HEADER.size
    for dtype, count in (("<i4", sequences), ("<i8", sequences), ("<i8", bounds)):
        mapped = np.memmap(path, dtype, mode="r", offset=offset, shape=(count,)) if count else np.zeros(0, dtype)
        columns.append(mapped)
        offset += mapped.nbytes
    bounds_D1 = columns[2]
    if not bounds or bounds_D1[0] != 0 or bounds_D1[-1] != sequences or (np.diff(bounds_D1) < 0).any():
        raise DataError(f"{path} is damaged", expected=f"bounds of documents that ascend from 0 to {sequences}")
    return np.dtype(_TYPES[code]), columns[0], columns[1], bounds_D1


def write(prefix: Path, tokens_T: np.ndarray, lengths_D: np.ndarray, vocab_size: int) -> tuple[Path, Path]:
    """Write documents as PREFIX.bin and PREFIX.idx, each a sequence of its own; returns both paths.

    `tokens_T` has all documents' ids, one document after another, and `lengths_D` the tokens of each. The index is
    written last: without it the data does not count. Raises DataError where one of the files exists.
    """
    data_path, index_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    if taken := [path for path in (data_path, index_path) if path.exists()]:
        raise DataError(f"{taken[0]} exists", hint="choose another name, or move it away")
    code = 8 if vocab_size < _FEW_IDS else 4
    dtype = np.dtype(_TYPES[code])
    with atomic_path(data_path) as tmp, tmp.open("wb") as stream:
        for start in range(0, tokens_T.size, _BLOCK_TOKENS):
            stream.write(tokens_T[start : start + _BLOCK_TOKENS].astype(dtype).tobytes())
    starts_D = np.cumsum(lengths_D, dtype=np.int64) - lengths_D
    with atomic_path(index_path) as tmp, tmp.open("wb") as stream:
        stream.write(_HEADER.pack(MAGIC, 1, code, lengths_D.size, lengths_D.size + 1))
        stream.write(lengths_D.astype("<i4").tobytes())
        stream.write((starts_D * dtype.itemsize).astype("<i8").tobytes())
        stream.write(np.arange(lengths_D.size + 1, dtype="<i8").tobytes())
    return data_path, index_path

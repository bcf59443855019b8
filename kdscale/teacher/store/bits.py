"""Small integers packed into few bits, written and read with numpy, many at a time.

M values, N rows of K values each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdscale.errors import FileError

Bytes = NDArray[np.uint8]


def width_of(largest: int) -> int:
    """How many bits hold 0 to `largest`."""
    return max(1, largest.bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `pack` makes of `count` values."""
    return sum(-(-count * width // 8) for width in _planes(bits))


def pack(values_M: NDArray[Any], bits: int) -> Bytes:
    """Values below 2**bits as planes of 8, 4, 2 and 1 bits, lowest bits first; each plane begins on a whole byte."""
    planes, shift, values_M = [], 0, values_M.astype(np.uint32)
    for width in _planes(bits):
        plane_M = ((values_M >> np.uint32(shift)) & np.uint32((1 << width) - 1)).astype(np.uint8)
        shift += width
        if width < 8:
            parts = 8 // width
            padded = np.zeros(-(-plane_M.size // parts) * parts, np.uint8)
            padded[: plane_M.size] = plane_M
            plane_M = np.zeros(padded.size // parts, np.uint8)
            for part in range(parts):
                plane_M |= padded[part::parts] << np.uint8(part * width)
        planes.append(plane_M)
    return np.concatenate(planes)


def unpack(packed: Bytes, count: int, bits: int) -> NDArray[Any]:
    """The first `count` values that were packed, in the smallest unsigned type that holds them."""
    dtype = np.dtype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)
    out_M: NDArray[Any] = np.empty(0, dtype)
    begin = shift = 0
    for width in _planes(bits):
        nbytes = -(-count * width // 8)
        plane_M = _spread(packed[begin : begin + nbytes], width)[:count]
        begin += nbytes
        if shift == 0:
            out_M = plane_M.astype(dtype)
        else:
            shifted_M: NDArray[Any] = plane_M.astype(dtype)
            np.left_shift(shifted_M, shift, out=shifted_M)
            np.bitwise_or(out_M, shifted_M, out=out_M)
        shift += width
    return out_M


def _planes(bits: int) -> Iterator[int]:
    while bits:
        width = next(width for width in (8, 4, 2, 1) if width <= bits)
        yield width
        bits -= width


def _spread(plane: Bytes, width: int) -> Bytes:
    """The values of `width` bits in each byte, one after another."""
    if width == 8:
        return plane
    if width == 1:
        return np.unpackbits(plane, bitorder="little")
    parts, mask = 8 // width, np.uint8((1 << width) - 1)
    out = np.empty(plane.size * parts, np.uint8)
    for part in range(parts):
        out[part::parts] = (plane >> np.uint8(part * width)) & mask
    return out


class _Split(NamedTuple):
    """Of each id, so many low bits are kept as they are; the rest of a row is a bitmap of so many bytes."""

    low_bits: int
    map_bytes: int


@lru_cache
def _split(vocab: int, entries: int) -> _Split:
    """The split that takes the fewest bytes a row."""

    def row_bits(split: _Split) -> int:
        return split.low_bits * entries + 8 * split.map_bytes

    choices = (_Split(low, -(-(entries + ((vocab - 1) >> low)) // 8)) for low in range(vocab.bit_length() + 1))
    return min(choices, key=row_bits)


def id_set_bytes(rows: int, vocab: int, entries: int) -> int:
    """How many bytes `pack_ids` makes."""
    split = _split(vocab, entries)
    return (packed_bytes(rows * entries, split.low_bits) if split.low_bits else 0) + rows * split.map_bytes


def pack_ids(ids_NK: NDArray[Any], vocab: int) -> Bytes:
    """Rows of different ids below `vocab`, each in rising order, after Elias and Fano.

    An id's low bits are kept; its high part h, of the i-th id of a row, is a one at place h + i of the row's bitmap. A
    row takes about 2 + log2(vocab / K) bits an id, less than the id alone, as the order of a set says nothing.
    """
    rows, entries = ids_NK.shape
    low_bits, map_bytes = _split(vocab, entries)
    bits = np.zeros((rows, 8 * map_bytes), np.uint8)
    places_NK = (ids_NK >> low_bits) + np.arange(entries)
    np.put_along_axis(bits, places_NK.astype(np.int64), 1, axis=1)
    low = [pack((ids_NK & ((1 << low_bits) - 1)).reshape(-1), low_bits)] if low_bits else []
    return np.concatenate([np.packbits(bits, axis=1, bitorder="little").reshape(-1), *low])


def unpack_ids(packed: Bytes, rows: int, vocab: int, entries: int) -> NDArray[np.int32]:
    """What `pack_ids` packed. Raises FileError for bytes that are no such rows."""
    low_bits, map_bytes = _split(vocab, entries)
    bits = np.unpackbits(packed[: rows * map_bytes], bitorder="little")
    places_M = np.flatnonzero(bits.view(np.bool_))
    if places_M.size != rows * entries:
        raise FileError("stored token ids", expected=f"{entries} a row", got=f"{places_M.size:,} in {rows:,} rows")
    ids_M = np.empty(places_M.size, np.int32)
    np.subtract(places_M, _places_of_zeros(rows, entries, map_bytes), out=ids_M, casting="unsafe")
    if low_bits:
        ids_M <<= np.int32(low_bits)
        ids_M |= unpack(packed[rows * map_bytes :], places_M.size, low_bits)
    if rows and not (ids_M.min() >= 0 and ids_M.max() < vocab):
        raise FileError("stored token ids", expected=f"0 to {vocab - 1}", got=f"{ids_M.min()} to {ids_M.max()}")
    return ids_M.reshape(rows, entries)


@lru_cache(maxsize=4)
def _places_of_zeros(rows: int, entries: int, map_bytes: int) -> NDArray[np.int64]:
    """Where the ones of the bitmaps are when all high parts are 0."""
    return (np.arange(rows)[:, None] * (8 * map_bytes) + np.arange(entries)).reshape(-1)

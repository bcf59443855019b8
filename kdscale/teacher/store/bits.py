"""Small integers packed into few bits, written and read with numpy, many at a time.

M values, N rows of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

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
    """Values below 2**bits as planes of 8, 4, 2 and 1 bits, lowest bits first; each plane begins on a whole byte.

    With 0 bits nothing is kept.
    """
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
    return np.concatenate(planes) if planes else np.empty(0, np.uint8)


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


@lru_cache
def _low_bits(vocab: int, ids: int, rows: int) -> int:
    """How many low bits of each id are kept as they are, so that `pack_ids` takes the fewest bits."""

    def bits(low: int) -> int:
        return low * ids + _map_bits(vocab, ids, rows, low)

    return min(range(vocab.bit_length() + 1), key=bits)


def _map_bits(vocab: int, ids: int, rows: int, low: int) -> int:
    return ids + rows * ((vocab - 1) >> low)


def id_sets_bytes(vocab: int, ids: int, rows: int) -> int:
    """How many bytes `pack_ids` makes of `ids` ids in `rows` rows."""
    low = _low_bits(vocab, ids, rows)
    return -(-_map_bits(vocab, ids, rows, low) // 8) + packed_bytes(ids, low)


def pack_ids(ids_M: NDArray[Any], sizes_N: NDArray[Any], vocab: int) -> Bytes:
    """Ids below `vocab`, the first sizes[0] of them in rising order, then the next sizes[1], after Elias and Fano.

    An id's low bits are kept. Its high part h is a one in a bitmap, behind as many zeros of its row as h. A row of K
    takes about 2 + log2(vocab / K) bits an id, less than the id alone, as the order of a set says nothing.
    """
    low = _low_bits(vocab, ids_M.size, sizes_N.size)
    bits = np.zeros(_map_bits(vocab, ids_M.size, sizes_N.size, low), np.uint8)
    bits[(ids_M >> low).astype(np.int64) + _places_of_zeros(sizes_N, vocab, low)] = 1
    return np.concatenate([np.packbits(bits, bitorder="little"), pack(ids_M & ((1 << low) - 1), low)])


def unpack_ids(packed: Bytes, sizes_N: NDArray[Any], vocab: int) -> NDArray[np.int32]:
    """What `pack_ids` packed. Raises FileError for bytes that are no such rows."""
    count = int(sizes_N.sum())
    low = _low_bits(vocab, count, sizes_N.size)
    map_bits = _map_bits(vocab, count, sizes_N.size, low)
    map_bytes = -(-map_bits // 8)
    bits = np.unpackbits(packed[:map_bytes], count=map_bits, bitorder="little")
    places_M = np.flatnonzero(bits.view(np.bool_))
    if places_M.size != count:
        raise FileError("stored token ids", expected=f"{count:,}", got=f"{places_M.size:,}")
    ids_M = np.empty(count, np.int32)
    np.subtract(places_M, _places_of_zeros(sizes_N, vocab, low), out=ids_M, casting="unsafe")
    ids_M <<= np.int32(low)
    if low:
        ids_M |= unpack(packed[map_bytes:], count, low)
    if count and not (ids_M.min() >= 0 and ids_M.max() < vocab):
        raise FileError("stored token ids", expected=f"0 to {vocab - 1}", got=f"{ids_M.min()} to {ids_M.max()}")
    return ids_M


def _places_of_zeros(sizes_N: NDArray[Any], vocab: int, low: int) -> NDArray[np.int64]:
    """Where the ones of the bitmap are when all high parts are 0."""
    zeros = (vocab - 1) >> low
    return (np.arange(sizes_N.size) * zeros).repeat(sizes_N) + np.arange(int(sizes_N.sum()))

"""The codec `sampled`: of each row the tokens that were drawn, and how often (RS-KD, arXiv 2503.16870). Exact.

The draws of a row are put in the order of their ids, with one more of the most likely token. A bit for each says
whether a token begins there: so a row has its counts in one bit a draw. Then come the place of the most likely token,
and the ids, as sets.

N rows, M tokens of all rows, K slots (one more than draws).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdscale.config.target_store import SampledConfig
from kdscale.errors import FileError
from kdscale.teacher.sampling import EMPTY
from kdscale.teacher.source import MicroBatch, SourceRequest
from kdscale.teacher.store.bits import Bytes, id_sets_bytes, pack, pack_ids, packed_bytes, unpack, unpack_ids, width_of
from kdscale.teacher.store.codecs import Assemble, Cursor, to_numpy
from kdscale.teacher.targets import SampledTargets, Targets


class SampledCodec:
    """Rows of so many draws, and as many slots as when they were drawn."""

    def __init__(self, settings: SampledConfig, vocab_size: int, hidden_size: int):
        self._vocab, self._draws, self._temperature = vocab_size, settings.draws, settings.temperature
        self._slots = settings.draws + 1
        self._place_bits = width_of(settings.draws)
        # D draws of text's usual distributions are fewer different tokens than this: about 20 at 50
        different = min(self._slots, round(4 * math.sqrt(settings.draws)), vocab_size)
        fixed = (self._slots + self._place_bits) / 8
        self.row_bytes = fixed + id_sets_bytes(vocab_size, 1000 * different, 1000) / 1000

    def encode(self, targets: Targets) -> Bytes:
        """Of slots in any order, of which the first is the most likely token's."""
        sampled = targets.sampled
        assert sampled is not None
        ids_NK, counts_NK = to_numpy(sampled.ids_NK), np.rint(to_numpy(sampled.weights_NK) * self._draws).astype(int)
        counts_NK[:, 0] += 1
        order_NK = np.where(ids_NK == EMPTY, self._vocab, ids_NK).argsort(axis=1, kind="stable")
        ids_NK, counts_NK = (np.take_along_axis(slots, order_NK, 1) for slots in (ids_NK, counts_NK))
        used_NK = ids_NK != EMPTY
        begins_NK = counts_NK.cumsum(1) - counts_NK + (np.arange(len(ids_NK)) * self._slots)[:, None]
        bits = np.zeros(len(ids_NK) * self._slots, np.uint8)
        bits[begins_NK[used_NK]] = 1
        places = pack((order_NK == 0).argmax(1), self._place_bits)
        ids = pack_ids(ids_NK[used_NK], used_NK.sum(1), self._vocab)
        return np.concatenate([np.packbits(bits, bitorder="little"), places, ids])

    def decode(self, packed: Bytes, rows: int) -> dict[str, NDArray[Any]]:
        """`ids` (int32) and `weights` (fp32): the most likely token, the others by id, then empty slots."""
        take, count = Cursor(packed), rows * self._slots
        bits = np.unpackbits(take.bytes(-(-count // 8)), count=count, bitorder="little")
        begins_M = np.flatnonzero(bits.view(np.bool_))
        row_M = begins_M // self._slots
        sizes_N = np.bincount(row_M, minlength=rows)
        firsts_N = sizes_N.cumsum() - sizes_N
        best_N = unpack(take.bytes(packed_bytes(rows, self._place_bits)), rows, self._place_bits).astype(np.int64)
        if not (bits[:: self._slots].all() and (best_N < sizes_N).all()):
            raise FileError("stored samples", expected=f"{self._draws} draws a row", got="rows that do not add up")
        ids = take.bytes(id_sets_bytes(self._vocab, begins_M.size, rows))
        take.end()
        ids_M, counts_M = unpack_ids(ids, sizes_N, self._vocab), np.diff(begins_M, append=count)
        # the token at a row's best place moves to its front, those before it move back by one
        places_M = np.arange(begins_M.size) - firsts_N.repeat(sizes_N)
        places_M += places_M < best_N.repeat(sizes_N)
        best_M = firsts_N + best_N
        places_M[best_M] = 0
        counts_M[best_M] -= 1
        places_M += row_M * self._slots
        ids_NK, weights_NK = np.full(count, EMPTY, np.int32), np.zeros(count, np.float32)
        ids_NK[places_M] = ids_M
        weights_NK[places_M] = counts_M.astype(np.float32) / np.float32(self._draws)
        return {"ids": ids_NK.reshape(rows, self._slots), "weights": weights_NK.reshape(rows, self._slots)}

    def assembler(self, request: SourceRequest, vocab_size: int) -> Assemble:
        """The tokens that were drawn when the store was written."""

        def assemble(arrays: Mapping[str, torch.Tensor], batch: MicroBatch) -> Targets:
            sampled = SampledTargets(arrays["ids"].long(), arrays["weights"], self._temperature, vocab_size)
            return Targets(rows=batch.rows, sampled=sampled)

        return assemble

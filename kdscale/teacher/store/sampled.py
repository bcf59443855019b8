"""The codec `sampled`: of each row the tokens that were drawn, and how often (RS-KD, arXiv 2503.16870). Exact.

N rows, M entries of all rows, K slots (one more than draws).
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
from kdscale.teacher.store.bits import Bytes, pack, packed_bytes, unpack, width_of
from kdscale.teacher.store.codecs import Assemble, Cursor, as_bytes, to_numpy
from kdscale.teacher.targets import SampledTargets, Targets


class SampledCodec:
    """How many entries each row has, then all entries: the number of draws above the id, in few bits."""

    def __init__(self, settings: SampledConfig, vocab_size: int, hidden_size: int):
        self._vocab, self._draws, self._temperature = vocab_size, settings.draws, settings.temperature
        self._id_bits = width_of(vocab_size - 1)
        self._bits = self._id_bits + width_of(settings.draws)
        self._count_type = "<u1" if settings.draws < 255 else "<u2"
        # D draws of text's usual distributions are fewer different tokens than this: 12 to 17 at 50
        different = min(1 + settings.draws, 4 * math.sqrt(settings.draws), vocab_size)
        self.row_bytes = 2 + different * self._bits / 8

    def encode(self, targets: Targets) -> Bytes:
        """The slots that are used, in their order."""
        sampled = targets.sampled
        assert sampled is not None
        ids_NK, weights_NK = to_numpy(sampled.ids_NK), to_numpy(sampled.weights_NK.float())
        used_NK = ids_NK != EMPTY
        draws_M = np.rint(weights_NK[used_NK] * self._draws).astype(np.uint32)
        entries_M = (draws_M << np.uint32(self._id_bits)) | ids_NK[used_NK].astype(np.uint32)
        sizes_N = used_NK.sum(1).astype(self._count_type)
        return np.concatenate([as_bytes(sizes_N), pack(entries_M, self._bits)])

    def decode(self, packed: Bytes, rows: int) -> dict[str, NDArray[Any]]:
        """`ids` (int32) and `weights` (fp32), with as many slots as when they were drawn."""
        take, slots = Cursor(packed), self._draws + 1
        sizes_N = take.array((rows,), self._count_type).astype(np.int64)
        count = int(sizes_N.sum())
        if rows and not (sizes_N.min() >= 1 and sizes_N.max() <= slots):
            raise FileError("stored samples", expected=f"1 to {slots} a row", got=f"{sizes_N.min()} to {sizes_N.max()}")
        entries_M = unpack(take.bytes(packed_bytes(count, self._bits) if count else 0), count, self._bits)
        take.end()
        ids_M = (entries_M & ((1 << self._id_bits) - 1)).astype(np.int32)
        if count and ids_M.max() >= self._vocab:
            raise FileError("stored token ids", expected=f"0 to {self._vocab - 1}", got=f"{ids_M.max()}")
        ends_N = sizes_N.cumsum()
        places_M = np.arange(count) + (np.arange(rows) * slots - (ends_N - sizes_N)).repeat(sizes_N)
        ids_NK, weights_NK = np.full(rows * slots, EMPTY, np.int32), np.zeros(rows * slots, np.float32)
        ids_NK[places_M] = ids_M
        weights_NK[places_M] = (entries_M >> self._id_bits).astype(np.float32) / np.float32(self._draws)
        return {"ids": ids_NK.reshape(rows, slots), "weights": weights_NK.reshape(rows, slots)}

    def assembler(self, request: SourceRequest, vocab_size: int) -> Assemble:
        """The tokens that were drawn when the store was written."""

        def assemble(arrays: Mapping[str, torch.Tensor], batch: MicroBatch) -> Targets:
            sampled = SampledTargets(arrays["ids"].long(), arrays["weights"], self._temperature, vocab_size)
            return Targets(rows=batch.rows, sampled=sampled)

        return assemble

"""The codec `topk`: the K most likely tokens as a set, their logits below the largest one, and the log-sum-exp.

Ids take about 2 + log2(V / K) bits each (bits.pack_ids). Of a row whose logits reach R below the largest, level q of
L = 2^bits − 1 stands for R·(q / L)²: fine where the probability is, coarse where there is none. At 6 bits and R = 10 a
probability of p times the largest is off by at most a factor of 1 ± 0.05·√ln(1/p); docs/how-to/cache-the-teacher.md
has what that does to the divergence. With 16 bits the distances are fp16, with 32 everything is exact.

N rows, K entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdscale.config.target_store import TopKConfig
from kdscale.teacher.source import MicroBatch, SourceRequest
from kdscale.teacher.store.bits import Bytes, id_sets_bytes, pack, pack_ids, packed_bytes, unpack, unpack_ids
from kdscale.teacher.store.codecs import Assemble, Cursor, as_bytes, to_numpy
from kdscale.teacher.targets import Targets, TopKTargets


class TopKCodec:
    """Rows of K entries each, in the order of their ids."""

    def __init__(self, settings: TopKConfig, vocab_size: int, hidden_size: int):
        self._vocab, self._entries = vocab_size, min(settings.top_k, vocab_size)
        self._bits, self._temperature = settings.bits, settings.temperature
        levels = np.arange(1 << min(self._bits, 8), dtype=np.float32)
        self._shape_L = -np.square(levels / levels[-1])
        header = 4 if self._bits > 8 else 6
        rows = 1000
        ids = id_sets_bytes(vocab_size, rows * self._entries, rows) / rows
        self.row_bytes = header + ids + self._entries * self._bits / 8

    def encode(self, targets: Targets) -> Bytes:
        """Sorted by id; the largest logit of a quantised row becomes 0, and the log-sum-exp is moved with it.

        A slot that is empty (logit −inf) becomes a copy of the most likely token, and is empty again when it is read.
        """
        top = targets.top_k
        assert top is not None
        ids_NK, logits_NK, lse_N = to_numpy(top.ids_NK), to_numpy(top.logits_NK.float()), to_numpy(top.lse_N.float())
        empty = ((0, 0), (0, self._entries - ids_NK.shape[1]))
        ids_NK, logits_NK = np.pad(ids_NK, empty), np.pad(logits_NK, empty, constant_values=-np.inf)
        best_N1 = logits_NK.argmax(1)[:, None]
        for entries in (ids_NK, logits_NK):
            np.copyto(entries, np.take_along_axis(entries, best_N1, 1), where=np.isneginf(logits_NK))
        order_NK = ids_NK.argsort(axis=1)
        ids_NK, logits_NK = (np.take_along_axis(entries, order_NK, 1) for entries in (ids_NK, logits_NK))
        ids = pack_ids(ids_NK.reshape(-1), self._sizes(len(ids_NK)), self._vocab)
        if self._bits == 32:
            return np.concatenate([as_bytes(lse_N), as_bytes(logits_NK), ids])
        largest_N1 = logits_NK.max(axis=1, initial=-np.inf, keepdims=True)
        lse_N = lse_N - largest_N1[:, 0] / np.float32(self._temperature)
        below_NK = largest_N1 - logits_NK
        if self._bits == 16:
            return np.concatenate([as_bytes(lse_N), as_bytes(below_NK.astype(np.float16)), ids])
        reach_N1 = _fp16_above(below_NK.max(axis=1, initial=0.0, keepdims=True))
        most = (1 << self._bits) - 1
        share_NK = np.sqrt(below_NK / np.maximum(reach_N1.astype(np.float32), np.float32(1e-6)))
        levels_NK = np.rint(share_NK * most).clip(0, most).astype(np.uint8)
        levels = pack(levels_NK.reshape(-1), self._bits)
        return np.concatenate([as_bytes(lse_N), as_bytes(reach_N1[:, 0]), levels, ids])

    def decode(self, packed: Bytes, rows: int) -> dict[str, NDArray[Any]]:
        """`ids` (int32), `logits` and `lse` (fp32)."""
        take, shape = Cursor(packed), (rows, self._entries)
        lse_N = take.array((rows,), "<f4")
        if self._bits == 32:
            logits_NK = take.array(shape, "<f4")
        elif self._bits == 16:
            logits_NK = -take.array(shape, "<f2").astype(np.float32)
        else:
            reach_N = take.array((rows,), "<f2").astype(np.float32)
            count = rows * self._entries
            levels = unpack(take.bytes(packed_bytes(count, self._bits)), count, self._bits)
            logits_NK = self._shape_L.take(levels, mode="clip").reshape(shape)
            logits_NK *= reach_N[:, None]
        ids_M = unpack_ids(
            take.bytes(id_sets_bytes(self._vocab, rows * self._entries, rows)), self._sizes(rows), self._vocab
        )
        take.end()
        return {"ids": ids_M.reshape(shape), "logits": logits_NK, "lse": lse_N}

    def _sizes(self, rows: int) -> NDArray[np.int64]:
        return np.full(rows, self._entries)

    def assembler(self, request: SourceRequest, vocab_size: int) -> Assemble:
        """The top K that are stored."""

        def assemble(arrays: Mapping[str, torch.Tensor], batch: MicroBatch) -> Targets:
            ids_NK, logits_NK = arrays["ids"].long(), arrays["logits"]
            logits_NK[:, 1:].masked_fill_(ids_NK[:, 1:] == ids_NK[:, :-1], float("-inf"))
            top = TopKTargets(ids_NK, logits_NK, arrays["lse"], self._temperature, vocab_size)
            return Targets(rows=batch.rows, top_k=top)

        return assemble


def _fp16_above(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The smallest fp16 numbers that are not below."""
    rounded = values.astype(np.float16)
    return np.where(rounded < values, np.nextafter(rounded, np.float16(np.inf)), rounded)

"""Divergence of attention: relations of MiniLM v2 (arXiv 2012.15828), or attention maps (TinyBERT, arXiv 1909.10351).

A relation is a softmax over scaled products of queries with queries, keys with keys or values with values, of the
positions that a position sees in its document. Both models' vectors are cut into as many relation heads, so that
neither numbers of heads nor widths have to agree. Maps are compared head by head where both models have as many heads,
and as their means over the heads otherwise. All is computed from what the attention of the chosen layers reads, some
heads and a block of queries at a time: no array has all pairs of positions for all heads.

T positions, Q queries and K keys of a block, G groups of R heads that share keys, D size of a head, A = G·R.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdscale.config.distill.layer_objectives import AttentionConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.blockwise import Block, block_values, sum_blocks, wide
from kdscale.models.attention import AttentionRows
from kdscale.models.documents import Documents
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets

_MOST_QUERIES = 256


@dataclass(frozen=True)
class _Scores:
    """One model's side of a comparison: what is multiplied, and how scores are made of it.

    Without queries the keys are multiplied with themselves.
    """

    key_TGD: Tensor
    query_TGRD: Tensor | None
    scale: float
    window: int | None = None
    softcap: float | None = None

    @classmethod
    def of_relation(cls, rows_TAD: Tensor, heads: int) -> _Scores:
        """Of vectors with themselves, cut into `heads`."""
        cut_TGD = rows_TAD.flatten(1).unflatten(1, (heads, -1))
        return cls(cut_TGD, None, cut_TGD.shape[-1] ** -0.5)

    @classmethod
    def of_map(cls, rows: AttentionRows) -> _Scores:
        """As the layer itself computes them."""
        query_TGRD = rows.query_TAD.unflatten(1, (rows.key_TGD.shape[1], -1))
        return cls(rows.key_TGD, query_TGRD, rows.kind.scale, rows.kind.window, rows.kind.softcap)

    @property
    def sharing(self) -> int:
        """R."""
        return 1 if self.query_TGRD is None else self.query_TGRD.shape[2]

    @property
    def heads(self) -> int:
        """A."""
        return self.key_TGD.shape[1] * self.sharing

    @property
    def inputs(self) -> list[Tensor]:
        """What a gradient is made for."""
        return [self.key_TGD] if self.query_TGRD is None else [self.key_TGD, self.query_TGRD]

    def log_shares(self, key_KGD: Tensor, query_QGRD: Tensor, seen_QK: Tensor, mean: bool) -> Tensor:
        """Logarithms of what each query gives to each key, [A, Q, K], or of the mean over the heads, [1, Q, K]."""
        if self.query_TGRD is None:
            query_QGRD = query_QGRD.unsqueeze(2)
        scores = torch.einsum("qgrd,kgd->grqk", query_QGRD, key_KGD).flatten(0, 1) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        # finite, so that a share of nothing times its logarithm is nothing
        log_AQK = torch.log_softmax(scores.masked_fill(~seen_QK, torch.finfo(scores.dtype).min / 4), -1)
        return torch.logsumexp(log_AQK, 0, keepdim=True) - math.log(len(log_AQK)) if mean else log_AQK


class Attention:
    """The objective `attention`: a mean over matched layers, over what is compared in them, and over heads."""

    def __init__(self, settings: AttentionConfig):
        self._settings = settings

    def __call__(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(summed loss, the same as the sum of attention_kl)."""
        layers, documents = self._settings.layers, batch.documents or Documents.of(batch.position_ids_BS)
        assert layers is not None
        positions = _Positions(documents, batch, all(rows.kind.causal for rows in student.attention.values()))
        losses = [
            _divergence(own, teacher, positions)
            for ours, theirs in layers.items()
            for own, teacher in self._compared(student.attention[ours], targets.attention[theirs])
        ]
        loss = torch.stack(losses).mean()
        return loss, loss.detach().float().reshape(1)

    def _compared(self, own: AttentionRows, teacher: AttentionRows) -> Iterator[tuple[_Scores, _Scores]]:
        heads = self._settings.relation_heads
        assert heads is not None
        for what in self._settings.compare:
            if what == "map":
                yield _Scores.of_map(own), _Scores.of_map(teacher)
            else:
                read = [{"query": r.query_TAD, "key": r.key_TGD, "value": r.value_TGD}[what] for r in (own, teacher)]
                yield _Scores.of_relation(read[0], heads), _Scores.of_relation(read[1], heads)


class _Positions:
    """Which positions see which, and which of them count. Where attention is not `causal` they see their document."""

    def __init__(self, documents: Documents, batch: MicroBatch, causal: bool):
        self.count, self._causal, device = sum(documents.lengths), causal, batch.rows_N.device
        self._begins = [0, *itertools.accumulate(documents.lengths)]  # on the host
        self._index_T = torch.arange(self.count, device=device, dtype=torch.int32)  # as the bounds
        self._document_T = torch.bucketize(self._index_T, documents.bounds_D1[1:], right=True)
        self.counted_T = torch.zeros(self.count, device=device).index_fill_(0, batch.rows_N, 1.0)

    def blocks(self, most_pairs: int) -> Iterator[tuple[slice, slice]]:
        """Queries and the keys that any of them may see, so that no block has many more pairs than `most_pairs`."""
        first = 0
        while first < self.count:
            begin = self._begins[bisect.bisect_right(self._begins, first) - 1]
            queries = min(_MOST_QUERIES, max(1, most_pairs // (self._last(first + _MOST_QUERIES) - begin)))
            end = min(first + queries, self.count)
            yield slice(first, end), slice(begin, self._last(end))
            first = end

    def _last(self, end: int) -> int:
        """The end of the keys that the queries before `end` see."""
        return end if self._causal else self._begins[bisect.bisect_left(self._begins, min(end, self.count))]

    def seen(self, queries: slice, keys: slice, window: int | None) -> Tensor:
        """[Q, K]: in the query's document, within the window, and, where attention is causal, not after it."""
        behind_QK = self._index_T[queries, None] - self._index_T[keys]
        seen_QK = self._document_T[queries, None] == self._document_T[keys]
        if self._causal:
            seen_QK &= behind_QK >= 0
        return seen_QK if window is None else seen_QK & (behind_QK.abs() < window)


def _divergence(own: _Scores, teacher: _Scores, positions: _Positions) -> Tensor:
    """Σ over positions that count of KL(teacher ‖ student), a mean over heads."""
    return sum_blocks(own.inputs, _blocks(own, teacher, positions))[0]


def _blocks(own: _Scores, teacher: _Scores, positions: _Positions) -> Iterator[Block]:
    most, mean = block_values(own.key_TGD.device), own.heads != teacher.heads
    sharing = max(own.sharing, teacher.sharing)  # the fewest heads that a block can have
    windows = [window for window in (own.window, teacher.window) if window is not None]
    for queries, keys in positions.blocks(most // (max(own.heads, teacher.heads) if mean else sharing)):
        pairs = (queries.stop - queries.start) * (keys.stop - keys.start)
        seen_QK = positions.seen(queries, keys, min(windows, default=None))
        counted_Q = positions.counted_T[queries]
        heads = _head_groups(own, teacher, max(1, most // pairs)) if not mean else [(slice(None), slice(None))]
        for own_heads, teacher_heads in heads:
            parts = [(0, (keys, own_heads)), (len(own.inputs) - 1, (queries, own_heads))]
            read = teacher.inputs[0][keys, teacher_heads], teacher.inputs[-1][queries, teacher_heads]
            yield Block(parts, _block_sums(own, teacher, read, seen_QK, counted_Q, mean))


def _head_groups(own: _Scores, teacher: _Scores, most: int) -> Iterator[tuple[slice, slice]]:
    """Groups of keys of both models, with the same query heads in both, of at most `most` heads where that can be."""
    groups, other = own.key_TGD.shape[1], teacher.key_TGD.shape[1]
    together = min(groups, other)  # neighbours of the finer one belong to one group of the coarser
    if groups % other and other % groups:
        yield slice(None), slice(None)
        return
    step = max(1, most * together // own.heads)
    for first in range(0, together, step):
        end = min(first + step, together)
        yield (
            slice(first * groups // together, end * groups // together),
            slice(first * other // together, end * other // together),
        )


def _block_sums(
    own: _Scores, teacher: _Scores, read: tuple[Tensor, Tensor], seen_QK: Tensor, counted_Q: Tensor, mean: bool
) -> Any:
    heads = 1 if mean else own.heads

    def sums(key_KGD: Tensor, query_QGRD: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_AQK = teacher.log_shares(wide(read[0]), wide(read[1]), seen_QK, mean)
        own_AQK = own.log_shares(key_KGD, query_QGRD, seen_QK, mean)
        kl_AQ = (teacher_AQK.exp() * (teacher_AQK - own_AQK)).sum(-1)
        return ((kl_AQ * counted_Q).sum() / heads).reshape(1)

    return sums

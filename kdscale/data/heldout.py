"""Batches of held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kdscale.config.distill.masking import EncoderTask
from kdscale.data.batches import Batch, SequenceKey, stack_sequences
from kdscale.data.encoders.classes import for_task
from kdscale.data.encoders.masking import check_task
from kdscale.data.encoders.whole_documents import check_room, first_fit, length_in_row, row_of
from kdscale.data.packing import IGNORED_LABEL, PackedSequence, check_seq_len, seeded_order
from kdscale.data.token_store import TokenSplit
from kdscale.errors import DataError


@dataclass
class _EvalRow:
    """A row of an eval batch being filled; every array is (S,)."""

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray  # UTF-8 bytes of each label
    tags: np.ndarray  # of each position's document
    documents: list[int]
    filled: int = 0


def eval_batches(
    split: TokenSplit,
    seq_len: int,
    micro_batch: int,
    max_tokens: int,
    seed: int = 0,
    task: EncoderTask | None = None,
) -> list[Batch]:
    """Held-out batches with exactly `max_tokens` labels that count, or all there are when the text has fewer.

    Documents are taken in turn from every source, in a seeded order within each, and of each only as many tokens as
    fit into one row after the split's prefix (unlabelled, 0 bytes), so that a small `max_tokens` still covers many
    documents. Rows are filled first fit, so that the end of a row never cuts a document; the rest of a row is padding
    with IGNORED_LABEL. Deterministic, and with no more rows than needed. `text_bytes` of a batch is the UTF-8 length of
    exactly the text its labels stand for (an end-of-text label is 0 bytes).

    Of an encoder's text: rows of whole documents with about as many positions, with the labels of its
    `task`: hidden tokens alone, or a class for each document.

    Raises DataError on the train split, which keeps no bytes per token, and where there is no label to measure on.
    """
    check_task(split.encoder, task)
    if split.encoder is not None:
        return _encoder_batches(split, seq_len, micro_batch, max_tokens, seed, task)
    check_seq_len(split, seq_len)
    rows: list[_EvalRow] = []
    left = max_tokens
    for document in _documents_in_turn(split, seed):
        if left <= 0:
            break
        most = min(len(split.document_tokens(document)) - 1, seq_len - len(split.prefix_ids))
        counts = _counting_labels(split, document, most)[:left]
        if counts.size:
            _add_to_first_fit(split, document, counts, rows, seq_len)
        left -= counts.size
    if not rows:
        raise DataError(
            "the held-out text has nothing to measure on",
            expected=f"a document with a label among its first {seq_len} tokens",
            hint="raise seq_len, where answers come after long questions, or hold other text out",
        )
    return [_eval_batch(rows[i : i + micro_batch], i) for i in range(0, len(rows), micro_batch)]


def _encoder_batches(
    split: TokenSplit, seq_len: int, micro_batch: int, max_tokens: int, seed: int, task: EncoderTask | None
) -> list[Batch]:
    check_room(split, seq_len)
    chosen: list[tuple[int, int]] = []
    left = max_tokens
    for document in _documents_in_turn(split, seed):
        if left <= 0:
            break
        chosen.append((document, length_in_row(split, document, seq_len)))
        left -= chosen[-1][1]
    rows = [row_of(split, documents, seq_len) for documents in first_fit(chosen, seq_len)]
    keys = [SequenceKey("heldout", number) for number in range(len(rows))]
    rows = [for_task(row, split, task, key, seed) for row, key in zip(rows, keys, strict=True)]
    starts = range(0, len(rows), micro_batch)
    return [stack_sequences(rows[i : i + micro_batch], keys[i : i + micro_batch]) for i in starts]


def _documents_in_turn(split: TokenSplit, seed: int) -> Iterator[int]:
    """Document numbers: one from each source in turn, in a seeded order within each source."""
    order = seeded_order(split.documents, seed, 0)
    labels_D = split.labels_D[order]
    sizes = np.bincount(labels_D)
    queues = np.split(order[np.argsort(labels_D, kind="stable")], np.cumsum(sizes[sizes > 0])[:-1])
    turn = 0
    while queues := [queue for queue in queues if turn < queue.size]:
        yield from (int(queue[turn]) for queue in queues)
        turn += 1


def _counting_labels(split: TokenSplit, document: int, most: int) -> np.ndarray:
    """Which of a document's first `most` tokens have a next one that is a label, ascending."""
    is_label = split.document_is_label(document)
    return np.arange(most) if is_label is None else np.flatnonzero(is_label[1 : most + 1])


def _add_to_first_fit(split: TokenSplit, document: int, counts: np.ndarray, rows: list[_EvalRow], seq_len: int) -> None:
    """Put a document up to the last token of `counts` into the first row with room; these have the next as label."""
    prefix, take = len(split.prefix_ids), int(counts[-1]) + 1
    row = next((row for row in rows if row.filled + prefix + take <= seq_len), None)
    if row is None:
        ids = np.full(seq_len, split.eos_id, dtype=np.int64)
        # each padding token is a document of its own (position 0), so it neither sees nor is seen
        positions, sizes, tags = (np.zeros(seq_len, dtype=np.int64) for _ in range(3))
        row = _EvalRow(ids, positions, np.full(seq_len, IGNORED_LABEL, np.int64), sizes, tags, [])
        rows.append(row)
    tokens, sizes = split.document_tokens(document), split.document_token_bytes(document)
    text = row.filled + prefix
    place = slice(text, text + take)
    row.ids[row.filled : text] = split.prefix_ids
    row.ids[place] = tokens[:take]
    row.positions[row.filled : text + take] = np.arange(prefix + take)
    row.labels[text + counts] = tokens[counts + 1]
    row.sizes[text + counts] = sizes[counts + 1]
    row.tags[row.filled : text + take] = split.tags_D[document]
    row.documents.append(document)
    row.filled = text + take


def _eval_batch(rows: Sequence[_EvalRow], first: int) -> Batch:
    sequences = [PackedSequence(row.ids, row.positions, row.labels, row.tags, row.documents) for row in rows]
    keys = [SequenceKey("heldout", first + number) for number in range(len(rows))]
    return stack_sequences(sequences, keys, text_bytes=sum(int(row.sizes.sum()) for row in rows))

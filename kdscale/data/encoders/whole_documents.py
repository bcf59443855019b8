"""Rows of whole documents, for encoders: each with its beginning and its end, and the rest of a row is padding.

An encoder reads a text from both sides and was trained on texts with both ends ([CLS] … [SEP]), so no window cuts one:
a document that is too long for a row loses its last tokens but for its end. Which documents share a row is chosen once,
first fit in a seeded order, and each epoch has the rows in another order: so every epoch has as many, and a row is a
pure function of (seed, number). Documents of a row do not see each other: position ids restart at 0 with each, and each
padding token is a document of its own.

The label of a position is the token that stands there (IGNORED_LABEL: padding); masking.py hides some of the tokens.

Dimension letters: S positions of a row, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdscale.data.packing import IGNORED_LABEL, PackedSequence, seeded_order
from kdscale.data.token_store import TokenSplit
from kdscale.errors import DataError

_OPEN_ROWS = 16  # of which the next document takes the first with room


def length_in_row(split: TokenSplit, document: int, seq_len: int) -> int:
    """Positions that a document takes of a row of `seq_len`."""
    tokens = int(split.offsets_D1[document + 1] - split.offsets_D1[document])
    return min(len(split.prefix_ids) + tokens, seq_len)


def check_room(split: TokenSplit, seq_len: int) -> None:
    """Raises DataError when a row has no room for text beside what begins and ends it."""
    assert split.encoder is not None
    ends = len(split.prefix_ids) + split.encoder.end_tokens
    if seq_len <= ends:
        raise DataError(
            f"a sequence of {seq_len} tokens has no room for text",
            expected=f"more than the {ends} tokens that begin and end each document", hint="raise seq_len",
        )  # fmt: skip


def first_fit(lengths: Iterable[tuple[int, int]], seq_len: int) -> list[list[int]]:
    """Rows of documents, from (document, positions that it takes) in the order in which they are placed."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (row, positions left) of the rows that are open
    for document, length in lengths:
        place = next((at for at, (_, left) in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([])
            room.append((len(rows) - 1, seq_len))
            place = len(room) - 1
        row, left = room[place]
        rows[row].append(document)
        room[place] = (row, left - length)
        if len(room) > _OPEN_ROWS:
            room.remove(min(room, key=lambda item: item[1]))
    return rows


def row_of(split: TokenSplit, documents: Sequence[int], seq_len: int) -> PackedSequence:
    """One row with these documents, which fit into it."""
    assert split.encoder is not None
    ids, positions, tags = (np.zeros(seq_len, np.int64) for _ in range(3))
    ids[:] = split.eos_id
    labels = np.full(seq_len, IGNORED_LABEL, np.int64)
    filled, ends = 0, split.encoder.end_tokens
    for document in documents:
        tokens, size = split.document_tokens(document), length_in_row(split, document, seq_len)
        kept = size - len(split.prefix_ids)
        if kept < len(tokens):
            tokens = np.concatenate([tokens[: kept - ends], tokens[len(tokens) - ends :]])
        place = slice(filled, filled + size)
        ids[place] = np.concatenate([np.asarray(split.prefix_ids, np.int64), tokens])
        positions[place] = np.arange(size)
        labels[place] = ids[place]
        tags[place] = split.tags_D[document]
        filled += size
    return PackedSequence(ids, positions, labels, tags, list(documents))


@dataclass
class DocumentRows:
    """The rows of documents that have epochs of their own; `documents`: by default all, each as often as its weight."""

    split: TokenSplit
    seq_len: int
    seed: int
    shuffle: bool = True
    documents: np.ndarray | None = None
    _rows: list[list[int]] = field(init=False)
    _order: tuple[int, np.ndarray] | None = field(init=False, default=None)  # of the epoch last asked for

    def __post_init__(self) -> None:
        check_room(self.split, self.seq_len)
        chosen = self.documents
        if chosen is None:
            chosen = np.repeat(np.arange(self.split.documents), self.split.weights_D)
        if self.shuffle:
            chosen = chosen[seeded_order(chosen.size, self.seed, 0)]
        sizes = np.minimum(self.split.lengths[chosen] + len(self.split.prefix_ids), self.seq_len)
        self._rows = first_fit(zip(chosen.tolist(), sizes.tolist(), strict=True), self.seq_len)

    @property
    def sequences(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def sequence(self, epoch: int, number: int) -> PackedSequence:
        """Row `number` of an epoch."""
        return row_of(self.split, self._documents(epoch, number), self.seq_len)

    def lengths(self, epoch: int, number: int) -> list[int]:
        """Positions of each document in that row, each padding token as one; reads no tokens."""
        found = [length_in_row(self.split, document, self.seq_len) for document in self._documents(epoch, number)]
        return found + [1] * (self.seq_len - sum(found))

    def _documents(self, epoch: int, number: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            rows = np.arange(len(self._rows))
            self._order = epoch, (rows[seeded_order(len(rows), self.seed, epoch + 1)] if self.shuffle else rows)
        return self._rows[int(self._order[1][number])]

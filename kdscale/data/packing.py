"""Documents to fixed-length sequences, as a pure function of (seed, epoch, sequence number).

An epoch puts the documents (each as often as its weight) in a seeded order, joins them end to end and cuts the stream
into windows of `seq_len`. Nothing is padded. The last window of an epoch would be partial and is left out; as the order
changes every epoch, so does what is left out. Within a window the position ids restart at 0 at every document, from
which transformers derives a mask that keeps documents apart. The label of a token is the next token of the same
document, also when that one lies beyond the window's end: every token but a document's first is predicted once. Where
the store says which tokens are labels (the answers of a chat), the others are read and not predicted.

Where the tokenizer begins a text with tokens of its own (a prefix of P tokens, usually BOS), so does each document, and
so does each window that continues one. A prefix has no labels, so the labels are the same with and without one. Every
window has S - P tokens of the stream that count, wherever the stream is cut, so that a window does not depend on those
before it. A window that begins where a document does has room for up to P more tokens. The next ones fill it,
unlabelled, as the next window has them too.

Dimension letters: S seq_len, D documents, R documents with repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kdscale.data.mixing import GOLDEN, mix64
from kdscale.data.token_store import TokenSplit
from kdscale.errors import DataError

IGNORED_LABEL = -100  # the label of a position that is not scored; torch's default ignore_index


class PackedSequence(NamedTuple):
    """One window: (S,) int64 arrays and the documents it touches, in order; `tags_S`: of each position's document."""

    input_ids_S: np.ndarray
    position_ids_S: np.ndarray
    labels_S: np.ndarray
    tags_S: np.ndarray
    document_ids: list[int]


def seeded_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), the same in every version: indices sorted by their SplitMix64 hash.

    Not numpy's Generator, whose streams may change between versions: a resumed run must see the same order.
    """
    key = _splitmix64(_splitmix64(np.asarray([seed], np.uint64)) ^ np.uint64(epoch))
    return np.argsort(_splitmix64(np.arange(count, dtype=np.uint64) ^ key), kind="stable")


def _splitmix64(x: np.ndarray) -> np.ndarray:
    return mix64(x + GOLDEN)


class EpochOrder:
    """The documents of one epoch in their order, and where each starts in the epoch's stream.

    `documents`: those of the epoch, by default all, each as often as its weight says.
    """

    def __init__(
        self, split: TokenSplit, seed: int, epoch: int, shuffle: bool = True, documents: np.ndarray | None = None
    ):
        repeated_R = np.repeat(np.arange(split.documents), split.weights_D) if documents is None else documents
        self.documents_R = repeated_R[seeded_order(repeated_R.size, seed, epoch)] if shuffle else repeated_R
        self.starts_R1 = np.concatenate(([0], np.cumsum(split.lengths[self.documents_R] + len(split.prefix_ids))))


def epoch_tokens(split: TokenSplit, documents: np.ndarray | None = None) -> int:
    """Tokens of an epoch of `documents`, with what begins each: by default of all, each as often as its weight says."""
    sizes_D = split.lengths + len(split.prefix_ids)
    return int((sizes_D * split.weights_D.astype(np.int64) if documents is None else sizes_D[documents]).sum())


def epoch_sequences(
    split: TokenSplit, seq_len: int, documents: np.ndarray | None = None, what: str = "the training text"
) -> int:
    """How many full windows an epoch of `documents` (`what` names them) has. Raises DataError when there is not one."""
    check_seq_len(split, seq_len)
    tokens = epoch_tokens(split, documents)
    if tokens < seq_len:
        raise DataError(
            f"{what} has {tokens} tokens",
            expected=f"at least one sequence of {seq_len}",
            hint="give more text or a smaller seq_len",
        )
    prefix = len(split.prefix_ids)
    return (tokens - prefix) // (seq_len - prefix)


def check_seq_len(split: TokenSplit, seq_len: int) -> None:
    """Raises DataError when a sequence has no room for text beside what the tokenizer begins it with."""
    if seq_len <= len(split.prefix_ids):
        raise DataError(
            f"a sequence of {seq_len} tokens has no room for text",
            expected=f"more than the {len(split.prefix_ids)} tokens that begin each sequence",
            hint="raise seq_len, or set data.add_special: never",
        )


class Windows:
    """The windows of documents that have epochs of their own: by default of all. Raises DataError without a window."""

    def __init__(
        self,
        split: TokenSplit,
        seq_len: int,
        seed: int,
        shuffle: bool = True,
        documents: np.ndarray | None = None,
        what: str = "the training text",
    ):
        self.sequences = epoch_sequences(split, seq_len, documents, what)
        self._split, self._seq_len, self._documents = split, seq_len, documents
        self._seed, self._shuffle = seed, shuffle
        self._order: tuple[int, EpochOrder] | None = None  # of the epoch last asked for

    def sequence(self, epoch: int, number: int) -> PackedSequence:
        """Window `number` of an epoch."""
        return packed_sequence(self._split, self._of(epoch), number, self._seq_len)

    def lengths(self, epoch: int, number: int) -> list[int]:
        """Positions of each document in that window; reads no tokens."""
        return document_lengths(self._split, self._of(epoch), number, self._seq_len)

    def _of(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, EpochOrder(self._split, self._seed, epoch, self._shuffle, self._documents)
        return self._order[1]


class _Piece(NamedTuple):
    """Tokens `first` to `last` of a document in a window; with what begins it, cut at the window's end, `size`."""

    document: int
    first: int
    last: int
    size: int
    text_start: int  # in the epoch's stream


def _pieces(split: TokenSplit, order: EpochOrder, number: int, seq_len: int) -> Iterator[_Piece]:
    """What window `number` holds, in order."""
    prefix = len(split.prefix_ids)
    begin = number * (seq_len - prefix)
    slot = int(np.searchsorted(order.starts_R1, begin, side="right")) - 1
    filled = 0
    while filled < seq_len:
        document, text_start = int(order.documents_R[slot]), int(order.starts_R1[slot]) + prefix
        first = max(begin - text_start, 0)
        last = min(first + max(seq_len - filled - prefix, 0), int(split.lengths[document]))
        size = min(prefix + last - first, seq_len - filled)
        yield _Piece(document, first, last, size, text_start)
        filled += size
        slot += 1


def document_lengths(split: TokenSplit, order: EpochOrder, number: int, seq_len: int) -> list[int]:
    """Positions of each document in window `number`, from the lengths of the texts alone."""
    return [piece.size for piece in _pieces(split, order, number, seq_len)]


def packed_sequence(split: TokenSplit, order: EpochOrder, number: int, seq_len: int) -> PackedSequence:
    """Window `number` (0 ≤ number < epoch_sequences) of the epoch that `order` belongs to."""
    prefix = len(split.prefix_ids)
    end = (number + 1) * (seq_len - prefix)  # in the epoch's stream
    ids, positions, labels, tags = (np.empty(seq_len, dtype=np.int64) for _ in range(4))
    documents = []
    filled = 0
    for document, first, last, size, text_start in _pieces(split, order, number, seq_len):
        tokens = split.document_tokens(document)
        place = slice(filled, filled + size)
        ids[place] = np.append(np.asarray(split.prefix_ids, np.int64), tokens[first:last])[:size]
        positions[place] = np.arange(size)
        labels[place] = np.append(np.full(prefix, IGNORED_LABEL), _next_labels(split, document, first, last))[:size]
        labels[filled + prefix + max(end - text_start - first, 0) : filled + size] = IGNORED_LABEL
        tags[place] = split.tags_D[document]
        documents.append(document)
        filled += size
    return PackedSequence(ids, positions, labels, tags, documents)


def _next_labels(split: TokenSplit, document: int, first: int, last: int) -> np.ndarray:
    """Labels of tokens first to last: the token after each where it is one, IGNORED_LABEL after the document's last."""
    after = slice(first + 1, last + 1)
    following = split.document_tokens(document)[after].astype(np.int64)
    if (is_label := split.document_is_label(document)) is not None:
        following[~is_label[after]] = IGNORED_LABEL
    return following if following.size == last - first else np.append(following, IGNORED_LABEL)

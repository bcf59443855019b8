"""The text of a batch in the teacher's tokens, and where the teacher speaks of each of the student's rows.

Both tokenizers cut the same bytes. A row predicts the student's token of the bytes s to e of a document. Where a token
of the teacher's begins at s too, its distribution is of what comes after the same text. Elsewhere its last token that
begins before s reaches over s: of its distribution there, only what goes on as the text did up to s counts.

B sequences, P the teacher's positions of each, N the student's rows, M the teacher's rows, C factors, K tokens of a
document's text, R rows of a document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kdscale.models.tokenizer.token_bytes import Vocabulary, VocabularyMap

NOWHERE = -1

_ROW_FIELDS = ("place", "skipped", "first", "behind", "true", "covered")
_FACTOR_FIELDS = ("row", "place", "first", "behind")


@dataclass(frozen=True)
class Retold:
    """A batch for the teacher: `ids_BP`, `positions_BP`, and the flat positions `rows_M` that it is asked at (int64).

    Each row of the student's has in `rows` (int64 [N] each): `place`, the number of the teacher's row that speaks of
    it, or NOWHERE; `skipped`, how many bytes before s that row's token begins; `first` and `behind`, the ranks of the
    pieces that begin with these bytes; `true`, the teacher's token there in the text, or NOWHERE; `covered`, 1 where
    that token reaches the end of the student's. Where it does not, the student's token is several of the teacher's, and
    its probability a product of `factors` (int64 [C] each): each is of a `row`, at a `place` of the teacher's, the sum
    over the pieces of ranks `first` up to `behind`.
    """

    ids_BP: np.ndarray
    positions_BP: np.ndarray
    rows_M: np.ndarray
    rows: dict[str, np.ndarray]
    factors: dict[str, np.ndarray]


def retell(
    vocabularies: VocabularyMap, ids_BS: np.ndarray, positions_BS: np.ndarray, rows_N: np.ndarray, labels_N: np.ndarray
) -> Retold:
    """The batch in the teacher's tokens; `rows_N` are flat positions, ascending, that predict `labels_N`."""
    teacher, (sequences, length) = vocabularies.teacher, ids_BS.shape
    spans = [(number, *span) for number in range(sequences) for span in _documents(positions_BS[number])]
    texts = [_Text(vocabularies.student, ids_BS[number, begin:end].tolist()) for number, begin, end in spans]
    tokens = teacher.cut([text.plain for text in texts])
    told = [_Told(vocabularies, text, ids, sizes) for text, (ids, sizes) in zip(texts, tokens, strict=True)]
    windows = [[one for one, (own, *_) in zip(told, spans, strict=True) if own == n] for n in range(sequences)]
    width = max(sum(len(one.ids) for one in window) for window in windows)
    ids_BP, positions_BP = (np.zeros((sequences, width), np.int64) for _ in range(2))
    for number, window in enumerate(windows):
        ids = list(itertools.chain.from_iterable(one.ids for one in window))
        places = [place for one in window for place in range(len(one.ids))]
        rest = width - len(ids)  # padding is a document of its own
        ids_BP[number], positions_BP[number] = [*ids, *[teacher.end] * rest], [*places, *range(rest)]
    begins = [number * width + before for number, window in enumerate(windows) for before in _before(window)]
    bounds = np.searchsorted(rows_N, [(number * length + a, number * length + b) for number, a, b in spans])
    parts = [
        one.rows(rows_N[first:end] - number * length - a, labels_N[first:end], int(first), begin)
        for one, (number, a, _), (first, end), begin in zip(told, spans, bounds, begins, strict=True)
    ]
    rows = {name: np.concatenate([part[name] for part, _ in parts]) for name in _ROW_FIELDS}
    listed = np.asarray([factor for _, factors in parts for factor in factors], np.int64).reshape(-1, 4)
    factors = dict(zip(_FACTOR_FIELDS, listed.T, strict=True))
    asked = np.unique(np.concatenate([rows["place"][rows["place"] >= 0], factors["place"], np.zeros(1, np.int64)]))
    rows["place"] = np.where(rows["place"] < 0, NOWHERE, np.searchsorted(asked, rows["place"]))
    factors["place"] = np.searchsorted(asked, factors["place"])
    return Retold(ids_BP, positions_BP, asked, rows, factors)


def _documents(positions_S: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last position, exclusive, of each document of a window."""
    starts = [*np.flatnonzero(positions_S == 0).tolist(), len(positions_S)]
    if starts[0] != 0:
        starts.insert(0, 0)
    yield from itertools.pairwise(starts)


def _before(window: Sequence[_Told]) -> Iterator[int]:
    """How many of the teacher's tokens come before each document of a window."""
    yield from itertools.accumulate((len(one.ids) for one in window[:-1]), initial=0)


class _Text:
    """What the student's tokens of a document in a window say: `plain`, and where in its bytes each token ends.

    A window may begin and end within a character: bytes that are no whole character are left out of `plain`.
    """

    def __init__(self, student: Vocabulary, ids: list[int]):
        self.lead = len(student.prefix) if tuple(ids[: len(student.prefix)]) == student.prefix else 0
        self.ended = len(ids) > self.lead and ids[-1] == student.end
        pieces = [student.pieces_V[token] for token in ids[self.lead : len(ids) - self.ended]]
        text = b"".join(pieces)
        cut = next((n for n, byte in enumerate(text[:4]) if byte & 0xC0 != 0x80), min(4, len(text)))
        self.plain = _whole_characters(text[cut:])
        self.ends_K = np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - cut


def _whole_characters(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start].decode()


class _Told:
    """A document in a window in the teacher's tokens, `ids`."""

    def __init__(self, vocabularies: VocabularyMap, text: _Text, ids_K: np.ndarray, bytes_K: np.ndarray):
        """What follows a token that the teacher's model does not know, it is not told."""
        teacher, unknown_K = vocabularies.teacher, ids_K >= vocabularies.teacher_rows
        if unknown_K.any():
            ids_K, bytes_K = (array[: int(unknown_K.argmax())] for array in (ids_K, bytes_K))
            text.ended = False
        self._vocabularies, self._text, self._bytes = vocabularies, text, text.plain.encode()
        self._ids_K, self._ends_K, self._lead = ids_K, np.cumsum(bytes_K), len(teacher.prefix)
        self.ids = [*teacher.prefix, *ids_K.tolist(), *([teacher.end] if text.ended else [])] or [teacher.end]

    def rows(
        self, positions_R: np.ndarray, labels_R: np.ndarray, number: int, begin: int
    ) -> tuple[dict[str, np.ndarray], list[tuple[int, int, int, int]]]:
        """(the fields of its rows, its factors); row R is number `number` + R of the batch, and places count from
        `begin`, where the document is among the flat positions."""
        text, vocabularies = self._text, self._vocabularies
        own_R = positions_R - text.lead
        ends_K = np.append(text.ends_K, 0) if len(text.ends_K) else np.zeros(1, np.int64)
        s_R = np.where(own_R < 0, 0, ends_K[np.clip(own_R, 0, max(len(text.ends_K) - 1, 0))])
        k_R = np.searchsorted(self._ends_K, s_R, side="right")  # the teacher's token that covers s
        skipped_R = s_R - np.append(0, self._ends_K)[k_R]
        place_R = np.where((self._lead + k_R == 0) | (s_R < 0), NOWHERE, begin + self._lead + k_R - 1)
        within_R = k_R < len(self._ids_K)
        true_R = np.where(within_R, np.append(self._ids_K, NOWHERE)[np.minimum(k_R, len(self._ids_K))], NOWHERE)
        at_end_R = ~within_R & (labels_R == vocabularies.student.end) & text.ended
        true_R[at_end_R] = vocabularies.teacher.end
        sizes_R = np.asarray([len(vocabularies.student.pieces_V[label]) for label in labels_R], np.int64)
        reach_R = np.append(self._ends_K, 0)[np.minimum(k_R, len(self._ends_K))]
        covered_R = (true_R != NOWHERE) & (at_end_R | (reach_R >= s_R + sizes_R))
        first_R, behind_R = np.full(len(s_R), NOWHERE), np.full(len(s_R), len(vocabularies.rank_V))
        for row in np.flatnonzero((skipped_R > 0) & (place_R >= 0)).tolist():
            gone_by = self._bytes[s_R[row] - skipped_R[row] : s_R[row]]
            first_R[row], behind_R[row] = vocabularies.starting_with(gone_by)
        factors = []
        for row in np.flatnonzero(~covered_R & (true_R != NOWHERE) & (place_R >= 0)).tolist():
            for place, first, behind in self._factors(int(k_R[row]), int(s_R[row] + sizes_R[row])):
                factors.append((number + row, begin + place, first, behind))
        columns = (place_R, skipped_R, first_R, behind_R, true_R, covered_R)
        return {name: column.astype(np.int64) for name, column in zip(_ROW_FIELDS, columns, strict=True)}, factors

    def _factors(self, k: int, end: int) -> list[tuple[int, int, int]]:
        """(place, first rank, rank behind) of the teacher's tokens from `k` to byte `end`; none past the window."""
        if not len(self._ends_K) or end > self._ends_K[-1]:
            return []
        out = []
        while k < len(self._ends_K):
            before, reach = int(self._ends_K[k - 1]) if k else 0, int(self._ends_K[k])
            if before >= end:
                break
            rank = int(self._vocabularies.rank_V[self._ids_K[k]])
            ranks = (rank, rank + 1) if reach <= end else self._vocabularies.starting_with(self._bytes[before:end])
            out.append((self._lead + k - 1, *ranks))
            k += 1
        return out

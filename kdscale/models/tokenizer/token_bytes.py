"""The vocabularies of two tokenizers, piece by piece as bytes, and how the teacher's map to the student's.

A piece of both vocabularies is the same token in both: its probability goes over as it is. Any other piece of the
teacher begins with some token of the student's; its probability goes to that token (a projection that needs no text and
no training), as a student that agreed with the teacher would first write that one.

V the teacher's token ids.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from kdscale.models.loading import load_tokenizer, read_tokenizer_config, special_tokens
from kdscale.models.tokenizer.tokenizing import BatchEncoder, EncodedText, document_end_id

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Vocabulary:
    """One tokenizer: the bytes of every token, what it puts around a text, and how it cuts one.

    `pieces_V` has b"" for ids without a token; an added token stands for its own name.
    """

    def __init__(self, tokenizer: Any, prefix: Sequence[int], end: int):
        """`prefix` begins a document, `end` ends one."""
        self.encoder = BatchEncoder.of(tokenizer)
        self.prefix, self.end = tuple(prefix), end
        self.pieces_V = _pieces(tokenizer, self.encoder.is_byte_level)
        self.names: dict[str, int] = tokenizer.get_vocab()
        self._added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}

    @classmethod
    def open(cls, folder: Path, trust_remote_code: bool = False) -> Vocabulary:
        """That of a model's folder. Raises CheckpointError or DataError for a tokenizer that cannot be used."""
        tokenizer = load_tokenizer(folder, trust_remote_code)
        special = special_tokens(tokenizer, read_tokenizer_config(folder))
        return cls(tokenizer, special.prefix, special.suffix[-1] if special.suffix else document_end_id(tokenizer))

    @property
    def size(self) -> int:
        """One more than the largest id: rows of a head beyond it are padding."""
        return len(self.pieces_V)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The token with these bytes; of several, one that was learned before one that was added or is for a byte."""
        order = sorted(self.names.items(), key=lambda item: (self._stands_in(*item), item[1]), reverse=True)
        return {self.pieces_V[token]: token for _, token in order if self.pieces_V[token]}

    def _stands_in(self, name: str, token: int) -> bool:
        return token in self._added or _BYTE_TOKEN.fullmatch(name) is not None

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.pieces_V), default=0)

    def cut(self, texts: Sequence[str]) -> list[EncodedText]:
        """Ids and bytes of each text, where a character of several byte tokens has one byte in each of them."""
        out = []
        for text, (ids, sizes) in zip(texts, self.encoder.encode(texts), strict=True):
            pieces = [self.pieces_V[token] for token in ids.tolist()]
            same = b"".join(pieces) == text.encode()  # else the tokenizer changed the text before it cut it
            out.append(EncodedText(ids, np.asarray([len(piece) for piece in pieces], np.int64) if same else sizes))
        return out

    def begins(self, texts: Sequence[bytes]) -> list[int]:
        """The token that each of these texts begins with, −1 where none does: by the tokenizer itself, which is asked
        for whole characters, else the longest that fits."""
        decoded = [_decoded(text) for text in texts]
        encoded = iter(self.encoder.encode([text for text in decoded if text]))
        found = []
        for text, plain in zip(texts, decoded, strict=True):
            first = int(next(encoded).ids[:1].sum()) if plain else -1
            fits = 0 <= first < self.size and self.pieces_V[first] and text.startswith(self.pieces_V[first])
            found.append(first if fits else self._longest_prefix(text))
        return found

    def _longest_prefix(self, text: bytes) -> int:
        lengths = range(min(self._longest, len(text)), 0, -1)
        return next((self.ids[text[:length]] for length in lengths if text[:length] in self.ids), -1)


def _pieces(tokenizer: Any, byte_level: bool) -> list[bytes]:
    literal = {  # in SentencePiece's way, ▁ is a space also in what was added as text
        token: entry.content for token, entry in tokenizer.added_tokens_decoder.items() if entry.special or byte_level
    }
    vocabulary = {token: piece for piece, token in tokenizer.get_vocab().items()}
    alphabet = _byte_alphabet() if byte_level else {}
    pieces_V = [b""] * (max(vocabulary, default=-1) + 1)
    for token, piece in vocabulary.items():
        if token in literal:
            pieces_V[token] = literal[token].encode()
        elif byte_level:
            pieces_V[token] = bytes(alphabet[character] for character in piece)
        elif match := _BYTE_TOKEN.fullmatch(piece):
            pieces_V[token] = bytes([int(match[1], 16)])
        else:
            pieces_V[token] = piece.replace("▁", " ").encode()
    return pieces_V


def _byte_alphabet() -> dict[str, int]:
    """Each character of GPT-2's alphabet and its byte: printable ones are themselves, the rest follow 255 in order."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = {chr(value): value for value in range(256) if chr(value) in alphabet}
    others = (value for value in range(256) if chr(value) not in own)
    return own | {chr(256 + number): value for number, value in enumerate(others)}


def _decoded(text: bytes) -> str:
    """The text, or "" where it is not whole characters."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return ""


class VocabularyMap:
    """The teacher's tokens in terms of the student's.

    `student_V`: the student's token that each one is, or begins with; −1 where there is none. `exact_V`: whether it is
    the same piece. `rank_V`: its place among all pieces by their bytes, so that those with one beginning are a range;
    −1 for ids that are no piece of text. `lacking_V` (bool): the student's tokens that are none of the teacher's. The
    end of a document is one token in both.
    """

    def __init__(self, teacher: Vocabulary, student: Vocabulary, project: bool = True, teacher_rows: int | None = None):
        """`project`: whether pieces that the student lacks go to what they begin with. `teacher_rows`: the ids that the
        teacher's model knows, where they are fewer than its tokenizer's."""
        self.teacher, self.student, self._project = teacher, student, project
        self.teacher_rows = teacher.size if teacher_rows is None else teacher_rows
        pieces = teacher.pieces_V
        self.student_V = np.asarray([student.ids.get(piece, -1) if piece else -1 for piece in pieces], np.int64)
        for name, token in teacher.names.items():  # of several tokens with the same bytes, the one of the same name
            if (
                (same := student.names.get(name)) is not None
                and pieces[token]
                and student.pieces_V[same] == pieces[token]
            ):
                self.student_V[token] = same
        self.student_V[teacher.end] = student.end
        self.exact_V = self.student_V >= 0
        self.lacking_V = np.asarray([bool(piece) and piece not in teacher.ids for piece in student.pieces_V])
        self.lacking_V[student.end] = False
        lacking = [token for token in np.flatnonzero(~self.exact_V).tolist() if pieces[token]]
        if project and lacking:
            self.student_V[lacking] = student.begins([pieces[token] for token in lacking])
        order = sorted((piece, token) for token, piece in enumerate(pieces) if piece)
        self._sorted = [piece for piece, _ in order]
        self.rank_V = np.full(len(pieces), -1, np.int64)
        self.rank_V[[token for _, token in order]] = np.arange(len(order))
        self._after: dict[tuple[int, int], int] = {}

    def starting_with(self, text: bytes) -> tuple[int, int]:
        """The ranks (first, behind the last) of the teacher's pieces that begin with `text`."""
        first = bisect_left(self._sorted, text)
        above = text.rstrip(b"\xff")
        if not above:
            return first, len(self._sorted)
        return first, bisect_left(self._sorted, above[:-1] + bytes([above[-1] + 1]))

    def after(self, tokens: Iterable[tuple[int, int]]) -> list[int]:
        """What the rest of a teacher's token is, or begins with, in the student's vocabulary; −1 for no rest.

        `tokens`: (token, how many of its bytes are left out at its beginning).
        """
        wanted = list(tokens)
        missing = [key for key in dict.fromkeys(wanted) if key not in self._after]
        rests = [self.teacher.pieces_V[token][skipped:] for token, skipped in missing]
        same = [self.student.ids.get(rest, -1) if rest else -1 for rest in rests]
        other = [number for number, found in enumerate(same) if found < 0 and rests[number]]
        if self._project and other:
            for number, found in zip(other, self.student.begins([rests[n] for n in other]), strict=True):
                same[number] = found
        self._after.update(zip(missing, same, strict=True))
        return [self._after[key] for key in wanted]

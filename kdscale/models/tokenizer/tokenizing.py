"""Text to token ids, and how many UTF-8 bytes of the text each token stands for.

Bits per byte is nats / (ln 2 · bytes of the scored text), so the bytes must be those of exactly the scored tokens. With
a byte-level tokenizer each token is a known string of bytes, even where it ends inside a character. With any other, the
character offsets give the bytes, and a character spread over several tokens counts at the first of them. Either way a
document's bytes add up to those of its text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, pre_tokenizers

from kdscale.errors import DataError

# Ends of a text in pretraining. An instruct model's eos ends a chat turn instead, which is not what ends a document.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>")  # the last is Gemma's

# The library needs about 140 bytes of memory for each byte of a text, so a longer text is encoded in spans.
_SPAN_CHARS = 200_000
_OVERLAP_CHARS = 4_000  # how far a span reaches into the one before it
_AGREEING_TOKENS = 32  # two spans are joined in the middle of so many equal tokens


class EncodedText(NamedTuple):
    """One text: ids and UTF-8 bytes of each token, both (tokens,) int64; no special tokens added."""

    ids: np.ndarray
    bytes: np.ndarray


def document_end_id(tokenizer: Any) -> int:
    """The id to append to every document: the vocabulary's end-of-text token, else the tokenizer's eos.

    Raises DataError when there is neither.
    """
    vocabulary = tokenizer.get_vocab()
    for token in _DOCUMENT_ENDS:
        if token in vocabulary:
            return int(vocabulary[token])
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token", expected="eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def padding_id(tokenizer: Any) -> int:
    """The id that fills rows of an encoder's text. Raises DataError when the tokenizer has none."""
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no padding token", expected="pad_token in tokenizer_config.json")
    return int(tokenizer.pad_token_id)


class BatchEncoder:
    """A private copy of a fast tokenizer, without truncation, padding or added special tokens.

    The copy is made when it is first used: who lets other processes encode needs none. `tokenizer_json` is UTF-8, not
    str, in which one rare character makes all 33 MB of Gemma's four times as large.
    """

    def __init__(self, tokenizer_json: bytes):
        self.json = tokenizer_json
        self.sha256 = hashlib.sha256(tokenizer_json).hexdigest()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_buffer(self.json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _token_lengths(self) -> np.ndarray | None:
        return _byte_level_lengths(self._tokenizer)

    @property
    def is_byte_level(self) -> bool:
        """Whether every token is written byte by byte, in GPT-2's alphabet."""
        return self._token_lengths is not None

    @classmethod
    def of(cls, tokenizer: Any) -> BatchEncoder:
        """The encoder of a transformers tokenizer. Raises DataError for one that is not backed by `tokenizers`."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError("the teacher's tokenizer is not a fast one", expected="a tokenizer.json in its folder")
        return cls(backend.to_str().encode())

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Ids and bytes of each text, in order."""
        short = [text for text in texts if len(text) <= _SPAN_CHARS]
        encodings = iter(self._tokenizer.encode_batch(short, add_special_tokens=False))
        return [self._encode_long(t) if len(t) > _SPAN_CHARS else self._with_bytes(t, next(encodings)) for t in texts]

    def token(self, token_id: int) -> str | None:
        """The token with this id, or None."""
        return self._tokenizer.id_to_token(token_id)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of some token ids."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def bytes_of(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes of the text that each of these ids stands for, (tokens,) int64.

        Of a vocabulary that is not written byte by byte: of each token decoded alone, a byte token as one byte.
        """
        if self._token_lengths is not None:
            within = ids < self._token_lengths.size
            return np.where(within, self._token_lengths[np.where(within, ids, 0)], 0)
        lengths = {int(i): _bytes_alone(self._tokenizer.id_to_token(int(i)) or "") for i in np.unique(ids)}
        return np.asarray([lengths[i] for i in ids.tolist()], np.int64)

    def _with_bytes(self, text: str, encoding: Encoding) -> EncodedText:
        ids = np.asarray(encoding.ids, dtype=np.int64)
        lengths = self._known_bytes(text, ids)
        if lengths is None:
            lengths = _bytes_from_ends(text, np.asarray([end for _, end in encoding.offsets], dtype=np.int64))
        return EncodedText(ids, lengths)

    def _encode_long(self, text: str) -> EncodedText:
        spans, span, keep_from = [], _Span.encode(self._tokenizer, text, 0, _SPAN_CHARS), 0
        while span.end < len(text):
            following = _Span.encode(self._tokenizer, text, span.end - _OVERLAP_CHARS, span.end + _SPAN_CHARS)
            seam = _seam(span, following)
            if seam is None:  # no safe place in the overlap, e.g. in one endless word: take a longer span
                span = _Span.encode(self._tokenizer, text, span.start, 2 * span.end - span.start)
                continue
            spans.append((span.ids[keep_from : seam[0]], span.ends[keep_from : seam[0]]))
            span, keep_from = following, seam[1]
        spans.append((span.ids[keep_from:], span.ends[keep_from:]))
        ids, ends = (np.concatenate(arrays) for arrays in zip(*spans, strict=True))
        lengths = self._known_bytes(text, ids)
        return EncodedText(ids, _bytes_from_ends(text, ends) if lengths is None else lengths)

    def _known_bytes(self, text: str, ids: np.ndarray) -> np.ndarray | None:
        """Bytes of each token of a byte-level vocabulary; None where only character offsets know them."""
        if self._token_lengths is None:
            return None
        lengths = self._token_lengths[ids]
        # a normaliser may have changed the text before it was split; then only offsets know the original bytes
        return lengths if int(lengths.sum()) == len(text.encode("utf-8")) else None


def tokens_of_spans(text: str, bytes_T: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens of `text` have a byte in one of `spans` (of characters, ascending), (tokens,) bool.

    `bytes_T` has the UTF-8 bytes of each token. One of 0 bytes goes on with the character of the token before it.
    """
    ends_T = np.cumsum(bytes_T)
    starts_T = ends_T - bytes_T
    inside_T = np.zeros(bytes_T.size, bool)
    for start, end in spans:
        first = len(text[:start].encode("utf-8"))
        inside_T |= (ends_T > first) & (starts_T < first + len(text[start:end].encode("utf-8")))
    own_T = np.flatnonzero(bytes_T)
    before_T = np.searchsorted(own_T, np.arange(bytes_T.size), side="right") - 1  # the last token that has bytes
    return inside_T[own_T[np.maximum(before_T, 0)]] if own_T.size else inside_T


class _Span(NamedTuple):
    """The tokens of text[start:end]: ids, and first and last character of each within the whole text, all (tokens,)."""

    start: int
    end: int
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def encode(cls, tokenizer: Tokenizer, text: str, start: int, end: int) -> _Span:
        end = min(end, len(text))
        encoding = tokenizer.encode(text[start:end], add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start
        return cls(start, end, np.asarray(encoding.ids, dtype=np.int64), offsets[:, 0], offsets[:, 1])


def _seam(before: _Span, after: _Span) -> tuple[int, int] | None:
    """Numbers of one and the same token in both spans, in the middle of a run of tokens that are equal in both.

    Tokenizers split a text from left to right and merge within what they split, so two spans that agree over a run go
    on as the whole text does: `before` until the run, `after` from it. None when there is no such run.
    """
    half = _AGREEING_TOKENS // 2
    first = int(np.searchsorted(before.starts, after.start))
    for i in range(first + half, before.ids.size - half):
        if before.starts[i] < before.ends[i - 1] or before.starts[i] == before.starts[i - 1]:
            continue  # inside a character
        j = int(np.searchsorted(after.starts, before.starts[i]))
        pairs = zip(before[2:], after[2:], strict=True)
        if j >= half and all(np.array_equal(a[i - half : i + half], b[j - half : j + half]) for a, b in pairs):
            return i, j
    return None


def _bytes_alone(token: str) -> int:
    """Bytes of a token of a SentencePiece vocabulary: ▁ is a space, <0xE2> a byte."""
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode("utf-8"))


def _byte_level_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of every token id of a byte-level vocabulary; None when some token is not written in that alphabet."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths_V = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int64)
    for token, i in vocabulary.items():
        if i in added:
            lengths_V[i] = len(added[i].encode("utf-8"))
        elif alphabet.issuperset(token):
            lengths_V[i] = len(token)
        else:
            return None
    return lengths_V


def _bytes_from_ends(text: str, ends: np.ndarray) -> np.ndarray:
    """Bytes between the end of what earlier tokens covered and each token's end; the last token takes any rest.

    `ends` has the number of characters before each token's end, (tokens,).
    """
    if not ends.size:
        return np.zeros(0, dtype=np.int64)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (characters >= 0x80).astype(np.uint8) + (characters >= 0x800) + (characters >= 0x10000)
    bytes_before = np.concatenate(([0], np.cumsum(widths, dtype=np.int64)))
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)
    return np.diff(bytes_before[ends], prepend=0)

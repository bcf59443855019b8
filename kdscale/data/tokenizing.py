"""Text to token ids, and how many UTF-8 bytes of the text each token stands for.

Bits per byte is nats / (ln 2 · bytes of the scored text), so the bytes must be those of exactly the scored tokens. With
a byte-level tokenizer each token is a known string of bytes, even where it ends inside a character. With any other, the
character offsets give the bytes, and a character spread over several tokens counts at the first of them. Either way a
document's bytes add up to those of its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from kdscale.errors import DataError

# Ends of a text in pretraining. An instruct model's eos ends a chat turn instead, which is not what ends a document.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


class EncodedText(NamedTuple):
    """One text: ids and UTF-8 bytes of each token, both (tokens,) int64; no end token appended."""

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


class BatchEncoder:
    """A private copy of a fast tokenizer, without truncation, padding or added special tokens."""

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError("the teacher's tokenizer is not a fast one", expected="a tokenizer.json in its folder")
        source = backend.to_str()
        self._tokenizer = Tokenizer.from_str(source)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        self._token_bytes_V = _byte_level_lengths(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Ids and bytes of each text, in order."""
        return [self._with_bytes(text, e) for text, e in zip(texts, self._encode_batch(texts), strict=True)]

    def _encode_batch(self, texts: Sequence[str]) -> list[Any]:
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def _with_bytes(self, text: str, encoding: Any) -> EncodedText:
        ids = np.asarray(encoding.ids, dtype=np.int64)
        if self._token_bytes_V is not None:
            lengths = self._token_bytes_V[ids]
            # a normaliser may have changed the text before it was split; then only offsets know the original bytes
            if int(lengths.sum()) == len(text.encode("utf-8")):
                return EncodedText(ids, lengths)
        return EncodedText(ids, _bytes_from_offsets(text, encoding.offsets))


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


def _bytes_from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes between the end of what earlier tokens covered and each token's end; the last token takes any rest."""
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    widths = [len(char.encode("utf-8")) for char in text]
    bytes_before = np.concatenate(([0], np.cumsum(widths, dtype=np.int64)))
    ends = np.maximum.accumulate(np.asarray([end for _, end in offsets], dtype=np.int64))
    ends[-1] = len(text)
    return np.diff(bytes_before[ends], prepend=0)

"""Texts that were seen before, in little memory: a set of 64-bit hashes of normalised texts."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np

from kdscale.data.sources import Document

_LEAST_MERGED, _MERGED_SHARE = 1 << 20, 16


class SeenTexts:
    """Remembers texts by a hash: 8 bytes for each in a sorted array, and those since the last merge in a Python set.

    Texts count as equal when they differ only in case, in white space and in how their characters are composed
    (Unicode NFC). Of 100 million texts the chance that any one is taken for another is 3 in 10,000.
    """

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, document: Document) -> bool:
        """Whether the document is new; remembers it."""
        digest = int.from_bytes(hashlib.blake2b(_normalised(document), digest_size=8).digest(), "little")
        if digest in self._recent:
            return False
        place = int(np.searchsorted(self._sorted, np.uint64(digest)))
        if place < self._sorted.size and int(self._sorted[place]) == digest:
            return False
        self._recent.add(digest)
        if len(self._recent) >= max(_LEAST_MERGED, self._sorted.size // _MERGED_SHARE):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate((self._sorted, recent)), kind="stable")
            self._recent = set()
        return True


def _normalised(document: Document) -> bytes:
    if document.ids is not None:
        return document.content
    return " ".join(unicodedata.normalize("NFC", document.text).casefold().split()).encode("utf-8")

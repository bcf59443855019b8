"""Answers that came before: equal ones by a hash, nearly equal ones by MinHash, through the library `datasketch`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from kdscale.config.responses.filters import DuplicatesConfig
from kdscale.responses.filters import Group, Tools
from kdscale.runtime.packages import require_packages

_RUN = 5  # words
_PERMUTATIONS = 128
_MOST_BANDED = 0.9  # of similarity; the library has no bands for more, and candidates are compared anyway


class Duplicates:
    """The filter `duplicates`.

    Case, punctuation and white space do not count. Near duplicates are found by locality-sensitive hashing of MinHash
    signatures of five-word runs (Broder 1997, "On the resemblance and containment of documents"): `similarity` is the
    Jaccard index that the signatures must estimate. An answer of fewer than five words is one run.
    """

    def __init__(self, settings: DuplicatesConfig, tools: Tools):
        del tools
        self._settings = settings
        if settings.similarity is not None:
            without = "similarity: null, which drops equal answers alone"
            require_packages("responses.filters: duplicates", ("datasketch",), "responses", without)
            import datasketch

            self._datasketch = datasketch
        self._begin()

    def _begin(self) -> None:
        """Forget what came before."""
        self._seen: set[bytes] = set()
        self._similar: Any
        self._signatures: dict[bytes, Any]
        self._similar, self._signatures = None, {}
        if (similarity := self._settings.similarity) is not None:
            self._similar = self._datasketch.MinHashLSH(threshold=min(similarity, _MOST_BANDED), num_perm=_PERMUTATIONS)

    def __call__(self, groups: Sequence[Group]) -> None:
        """Drop answers that came before; the first of equals is kept."""
        for group in groups:
            if self._settings.within == "prompt":
                self._begin()
            for answer in group.kept:
                if self._came_before(answer.text):
                    answer.dropped_by = self._settings.name

    def _came_before(self, text: str) -> bool:
        """Whether a kept answer is like this one; if none is, this one counts from now on."""
        words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
        digest = hashlib.sha256(" ".join(words).encode()).digest()[:16]
        if digest in self._seen:
            return True
        if self._similar is not None:
            signature = self._datasketch.MinHash(num_perm=_PERMUTATIONS, seed=1)
            runs = {" ".join(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))}
            signature.update_batch([run.encode() for run in runs])
            candidates = (self._signatures[key] for key in self._similar.query(signature))
            if any(other.jaccard(signature) >= self._settings.similarity for other in candidates):
                return True
            self._similar.insert(digest, signature)
            self._signatures[digest] = signature
        self._seen.add(digest)
        return False

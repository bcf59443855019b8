"""Evaluation text in the training text: runs of N tokens that both have.

GPT-3 (arXiv 2005.14165, appendix C) looked for shared 13-grams of words; here they are of tokens, which costs no second
reading of the text and also works where only tokens are known. Equal words have equal tokens but at the edges of a run,
so a shared passage of some length is found in any place. Text that differs in case or in white space is not.

T tokens, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kdscale.data.mixing import GOLDEN, mix64

_BLOCK_TOKENS = 1 << 20
_TABLE_BITS = 24
_EXAMPLES, _EXAMPLE_TOKENS = 5, 40


class Text(NamedTuple):
    """Documents, one after another: token ids, and where each document starts (the last entry is the end)."""

    tokens_T: np.ndarray
    offsets_D1: np.ndarray


@dataclass(frozen=True)
class Leak:
    """A passage of the training text that the evaluation text has too: `size` tokens from `first` on."""

    document: int
    first: int
    size: int


@dataclass(frozen=True)
class Leaks:
    """Which training documents share a run with the evaluation text, and the share of that text that they have."""

    documents: np.ndarray  # numbers, ascending
    covered: float  # share of the evaluation text's tokens that lie in a shared run
    examples: tuple[Leak, ...]  # of different documents

    def facts(self, train: Text, size: int, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        """For the manifest: counts, and the examples' text."""
        ends = [leak.first + min(leak.size, _EXAMPLE_TOKENS) for leak in self.examples]
        texts = [
            decode(train.tokens_T[leak.first : end].tolist()) for leak, end in zip(self.examples, ends, strict=True)
        ]
        return {"tokens": size, "documents": int(self.documents.size), "covered": self.covered, "examples": texts}


def in_words(facts: dict[str, Any]) -> list[str]:
    """What Leaks.facts gave, for the terminal."""
    size, documents = facts["tokens"], facts["documents"]
    if not documents:
        return [f"  no run of {size} tokens of the evaluation text is in the training text"]
    where = f"{documents:,} training documents" + (", which are left out" if facts.get("dropped") else "")
    return [
        f"  note: {facts['covered']:.2%} of the evaluation text lies in runs of {size} tokens that are also in {where}",
        *(f"    for example {text!r}" for text in facts["examples"]),
    ]


def find_leaks(train: Text, evaluation: Iterable[Text], size: int) -> Leaks:
    """Look for the runs of `size` tokens of `evaluation` in `train`; runs across two documents do not count.

    It takes 8 bytes of memory for each token of the evaluation text and a fixed amount for the training text.
    """
    evaluation = tuple(evaluation)
    known = np.unique(np.concatenate([runs.hashes for text in evaluation for runs in _runs(text, size)] or [_NONE]))
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[known >> np.uint64(64 - _TABLE_BITS)] = True
    is_shared = np.zeros(known.size, bool)
    documents: list[np.ndarray] = [np.zeros(0, np.int64)]
    examples: list[Leak] = []
    for runs in _runs(train, size):
        maybe = np.flatnonzero(table[runs.hashes >> np.uint64(64 - _TABLE_BITS)])
        places = np.searchsorted(known, runs.hashes[maybe])
        hits = known[np.minimum(places, known.size - 1)] == runs.hashes[maybe]
        is_shared[places[hits]] = True
        positions = runs.positions[maybe[hits]]
        found, firsts = np.unique(np.searchsorted(train.offsets_D1, positions, side="right") - 1, return_index=True)
        for document, first in zip(found.tolist(), firsts.tolist(), strict=True):
            if len(examples) < _EXAMPLES and not (examples and examples[-1].document == document):
                follow = np.arange(positions.size - first)
                length = int((positions[first:] == positions[first] + follow).cumprod().sum())
                examples.append(Leak(document, int(positions[first]), size + length - 1))
        documents.append(found)
    shared = known[is_shared]
    return Leaks(np.unique(np.concatenate(documents)), _covered(evaluation, shared, size), tuple(examples))


_NONE = np.zeros(0, np.uint64)


class _Runs(NamedTuple):
    """Runs of tokens: a hash of each, and where it begins."""

    hashes: np.ndarray
    positions: np.ndarray


def _runs(text: Text, size: int) -> Iterator[_Runs]:
    """All runs of `size` tokens within a document, some millions at a time."""
    for start in range(0, text.tokens_T.size - size + 1, _BLOCK_TOKENS):
        tokens = np.asarray(text.tokens_T[start : start + _BLOCK_TOKENS + size - 1])
        first = np.searchsorted(text.offsets_D1, start, side="right") - 1
        ends = text.offsets_D1[first + 1 : np.searchsorted(text.offsets_D1, start + tokens.size) + 1] - start
        inside = np.ones(tokens.size - size + 1, bool)
        for back in range(1, size):  # a run that begins so many tokens before a document's end reaches beyond it
            places = ends - back
            inside[places[(places >= 0) & (places < inside.size)]] = False
        positions = np.flatnonzero(inside)
        yield _Runs(_run_hashes(tokens, size)[positions], positions + start)


def _run_hashes(tokens: np.ndarray, size: int) -> np.ndarray:
    """A 64-bit hash of each run: a polynomial of its tokens, put together from runs of powers of two, then mixed."""
    power, weight = mix64(tokens.astype(np.uint64)), GOLDEN  # of runs of `length`, and the base to the power of it
    total, length, done = np.zeros(tokens.size, np.uint64), 1, 0
    with np.errstate(over="ignore"):
        while True:
            if size & length:
                total = total[: tokens.size - done - length + 1] * weight + power[done:] if done else power
                done += length
            if done == size:
                return mix64(total)
            power = power[:-length] * weight + power[length:]
            weight, length = weight * weight, 2 * length


def _covered(evaluation: Sequence[Text], shared: np.ndarray, size: int) -> float:
    """Share of the tokens that lie in a run with a hash in `shared`."""
    covered = total = 0
    for text in evaluation:
        marks = np.zeros(text.tokens_T.size + 1, np.int32)
        for runs in _runs(text, size):
            positions = runs.positions[np.isin(runs.hashes, shared)]
            np.add.at(marks, positions, 1)
            np.add.at(marks, positions + size, -1)
        covered += int((np.cumsum(marks) > 0).sum())
        total += text.tokens_T.size
    return covered / max(total, 1)

"""Whether two samples of text are of one kind: by the sources they come from, and by the words they use.

A regression that is fitted on one kind of text does worse on others (docs/explanation/measured-pruning.md), so whoever
fits on a sample asks whether it stands for the text that matters.

Letters: V tokens of the vocabulary that occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Two samples differ in kind when their words are farther apart than chance by so many nats, and by so many standard
# deviations of chance. Over 16 kinds of English text and samples of 8 to 64 sequences of 512 tokens, samples of one
# kind are at most 0.017 nats beyond chance; from 24 sequences on, different kinds are at least 0.026.
LIMIT_NATS, LIMIT_DEVIATIONS = 0.025, 3.0
_SHUFFLES = 24

# A source is missing from a sample when it is so much of the text, and less than this part of that in the sample.
LEAST_SHARE, MISSING_PART = 0.05, 0.25


@dataclass(frozen=True)
class Unlikeness:
    """How far apart the words of two samples are, in nats; `chance` and `deviation`: the same rows, shuffled."""

    distance: float
    chance: float
    deviation: float

    @property
    def beyond_chance(self) -> float:
        """Nats; about 0 for two samples of one kind, whatever their sizes."""
        return self.distance - self.chance

    @property
    def differ(self) -> bool:
        """Whether the two are of different kinds."""
        return self.beyond_chance > max(LIMIT_NATS, LIMIT_DEVIATIONS * self.deviation)


def unlikeness(first: Sequence[np.ndarray], second: Sequence[np.ndarray], seed: int = 0) -> Unlikeness:
    """Jensen-Shannon divergence of the token frequencies of two samples, whose rows are token ids of one tokenizer.

    Small samples are far apart by chance alone, and rows keep their words together, so chance is what the same rows
    give when they are dealt out anew. Raises ValueError for a sample without a token.
    """
    rows = [np.asarray(row).ravel() for row in (*first, *second)]
    if not sum(row.size for row in rows[: len(first)]) or not sum(row.size for row in rows[len(first) :]):
        raise ValueError("a sample has no token")
    _, ids = np.unique(np.concatenate(rows), return_inverse=True)
    ends = np.cumsum([row.size for row in rows])
    counts_RV = np.stack([np.bincount(row, minlength=ids.max() + 1) for row in np.split(ids, ends[:-1])])
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(rows)) for _ in range(_SHUFFLES)]
    by_chance = [_divergence(counts_RV[order], len(first)) for order in orders]
    return Unlikeness(_divergence(counts_RV, len(first)), float(np.mean(by_chance)), float(np.std(by_chance)))


def _divergence(counts_RV: np.ndarray, first: int) -> float:
    p_V, q_V = (side.sum(0) / side.sum() for side in (counts_RV[:first], counts_RV[first:]))
    middle_V = (p_V + q_V) / 2

    def to_middle(share_V: np.ndarray) -> float:
        there = share_V > 0
        return float((share_V[there] * np.log(share_V[there] / middle_V[there])).sum())

    return (to_middle(p_V) + to_middle(q_V)) / 2


def missing_sources(sample: Mapping[str, float], text: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """The sources that a sample hardly has, with their shares in the text and in the sample; any counts will do."""
    in_text, in_sample = sum(text.values()) or 1, sum(sample.values()) or 1
    shares = {name: (count / in_text, sample.get(name, 0) / in_sample) for name, count in text.items()}
    return {name: both for name, both in shares.items() if both[0] >= LEAST_SHARE and both[1] < MISSING_PART * both[0]}

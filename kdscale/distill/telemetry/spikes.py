"""Spikes of the loss, and the documents that such a step was trained on."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kdscale.config.telemetry import SpikeConfig
from kdscale.data.batches import PackedLoader
from kdscale.distill.non_finite import first_dozen

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_CENTRE = 16  # newest losses whose median is where the next one is expected
_LEAST_SPREAD = 0.01  # of the median: the spread of a loss that hardly moves is taken to be this


@dataclass(frozen=True)
class Spike:
    """A loss above the limit that the steps before it set."""

    loss: float
    median: float
    limit: float


class SpikeDetector:
    """Compares a loss with the median of the last 16 and the spread of the last `window` differences between steps.

    Medians, so that a few spikes move neither; differences, because early in a run the losses of a window spread far
    by falling alone, which would hide a spike. `known` are losses of earlier steps, oldest first, so that a resumed run
    sees what an unbroken one would.
    """

    def __init__(self, settings: SpikeConfig, known: Iterable[float] = ()):
        self._settings = settings
        self._losses: deque[float] = deque(known, maxlen=settings.window)

    def look(self, loss: float) -> Spike | None:
        """The spike, if a step's loss is one; then count the loss among those before the next (unless not finite)."""
        if not self._settings.enabled or not math.isfinite(loss):
            return None
        spike = None
        if len(self._losses) >= min(self._settings.after, self._settings.window):
            losses = list(self._losses)
            median = statistics.median(losses[-_CENTRE:])
            moves = [abs(after - before) for before, after in itertools.pairwise(losses)]
            sigma = _MAD_TO_SIGMA * statistics.median(moves) / math.sqrt(2)  # a difference holds two steps' noise
            limit = median + self._settings.factor * max(sigma, _LEAST_SPREAD * abs(median))
            spike = Spike(loss, median, limit) if loss > limit else None
        self._losses.append(loss)
        return spike


def describe_batch(loader: PackedLoader, step: int, micro_sums: Sequence[float]) -> list[dict[str, Any]]:
    """The global batch of optimiser step `step` (from 0): one row per micro-batch of any rank, in the global order.

    `micro_sums` are the summed losses of the micro-batches in that order. A row has the sequences' numbers, their
    documents with the source of each, and the loss per token (None when it is not finite).
    """
    sequences = loader.describe(step)
    size = len(sequences) // len(micro_sums)
    rows = []
    for number, total in enumerate(micro_sums):
        micro_batch = sequences[number * size : (number + 1) * size]
        mean = total / max(sum(item["labels"] for item in micro_batch), 1)
        rows.append({"loss": mean if math.isfinite(mean) else None, "sequences": micro_batch})
    return rows


def name_documents(rows: Sequence[dict[str, Any]]) -> str:
    """`3 (books), 17 (web)`: the documents of these micro-batches, each once, at most a dozen.

    Those of the highest loss come first, and before them those of a loss that is not finite.
    """
    ordered = sorted(rows, key=lambda row: -math.inf if row["loss"] is None else -row["loss"])
    sources: dict[int, str] = {}  # by document
    for row in ordered:
        for item in row["sequences"]:
            sources.update(zip(item["documents"], item["sources"], strict=True))
    names = [f"{document} ({source})" for document, source in sources.items()]
    return first_dozen(names) or "none: it is the student's own text"

"""Is this step's loss out of line, and which documents was it trained on."""

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

_MAD_TO_SIGMA = 1.4826  # of a normal distribution


_CENTRE = 16  # newest losses whose median is where the next one is expected


_LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves has no spread worth the name


_SHOWN_DOCUMENTS = 12


@dataclass(frozen=True)
class Spike:
    """A loss above the limit that the steps before it set."""

    loss: float
    median: float
    limit: float


class SpikeDetector:
    """Median of the last 16 losses, and the spread of one step that the last `window` differences between steps imply.

    Medians, so that a few spikes move neither; differences, because early in a run the losses of a window spread far
    by falling alone, which would hide a spike. `known` are losses of earlier steps, oldest first: a resumed run sees
    what an unbroken one would.
    """

    def __init__(self, settings: SpikeConfig, known: Iterable[float] = ()):
        self._settings = settings
        self._losses: deque[float] = deque(known, maxlen=settings.window)

    def look(self, loss: float) -> Spike | None:
        """Compare a step's loss with those before it, then count it among them (unless it is not finite)."""
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
    """The global batch of optimiser step `step` (from 0), a row a micro-batch of any rank, in the global order.

    `micro_sums` are the summed losses of the micro-batches in that order. A row holds the sequences' numbers, their
    documents with the source of each, and the loss a token (None when it is not finite).
    """
    sequences = loader.describe(step)
    each = len(sequences) // len(micro_sums)
    rows = []
    for number, total in enumerate(micro_sums):
        mine = sequences[number * each : (number + 1) * each]
        mean = total / max(sum(item["labels"] for item in mine), 1)
        rows.append({"loss": mean if math.isfinite(mean) else None, "sequences": mine})
    return rows


def name_documents(rows: Sequence[dict[str, Any]]) -> str:
    """`3 (books), 17 (web)`: the documents of these micro-batches, each once, the highest loss first, at most a dozen.

    A micro-batch whose loss is not finite comes before all others.
    """
    ordered = sorted(rows, key=lambda row: -math.inf if row["loss"] is None else -row["loss"])
    found: dict[int, str] = {}
    for row in ordered:
        for item in row["sequences"]:
            found.update(zip(item["documents"], item["sources"], strict=True))
    more = f" and {len(found) - _SHOWN_DOCUMENTS} more" if len(found) > _SHOWN_DOCUMENTS else ""
    return ", ".join(f"{name} ({source})" for name, source in list(found.items())[:_SHOWN_DOCUMENTS]) + more

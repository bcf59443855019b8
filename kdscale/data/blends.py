"""The order of a blend: which source each window of training text is taken from.

The windows of all sources are put in order by when they are due: window k (from 0) of a source that has W of P windows
is due at (k + 1/2) / W. After any number of windows each source has its share but for about one window (the divisor
method of Webster and Sainte-Laguë). The order repeats after P windows, in which each source has a whole number of them.
So the place of any window is known without those before it, and a run resumes anywhere, with any number of ranks.

Megatron-LM's BlendedDataset blends windows too, each of one source; its index is made window after window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdscale.errors import ConfigError

PERIOD = 1 << 16  # windows


class BlendOrder:
    """The order of `shares` (of 1, one for each source), endless."""

    def __init__(self, shares: Sequence[float]):
        self.counts = _whole_counts(shares)
        sources_P = np.repeat(np.arange(len(shares)), self.counts)
        within_P = np.concatenate([np.arange(count) for count in self.counts])
        order_P = np.argsort((within_P + 0.5) / np.asarray(self.counts)[sources_P], kind="stable")
        self._sources_P, self._within_P = sources_P[order_P], within_P[order_P]

    def place(self, number: int) -> tuple[int, int]:
        """The source of window `number` (from 0), and which of that source's windows it is."""
        period, i = divmod(number, PERIOD)
        source = int(self._sources_P[i])
        return source, period * self.counts[source] + int(self._within_P[i])


def _whole_counts(shares: Sequence[float]) -> list[int]:
    """Windows of each source in a period: whole numbers that add up to it, by the largest remainders.

    Raises ConfigError for a share so small that it would have none.
    """
    exact = np.asarray(shares, np.float64) * (PERIOD / sum(shares))
    counts = np.floor(exact).astype(np.int64)
    for source in np.argsort(counts - exact, kind="stable")[: PERIOD - int(counts.sum())]:
        counts[source] += 1
    if not counts.all():
        raise ConfigError(
            "data.blend.weights",
            expected=f"shares of at least 1 in {PERIOD:,}",
            got=", ".join(f"{share:.2g}" for share in np.asarray(shares)[counts == 0]),
        )
    return counts.tolist()

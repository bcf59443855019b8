"""Scores of several models on the same items: means, differences and how sure they are. All fp64.

Items are given to every model, so a difference is known better than either mean. Letters: N items, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
_BLOCK = 1 << 22  # counts held at once
_SIDES = (2.5, 97.5)  # percentiles: an interval of 95 %


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error; None with fewer than two items."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Difference:
    """Later less earlier, by item: standard error, bootstrap interval of 95 %, and how many items rose and fell.

    `p`: McNemar's exact test of whether as many rose as fell, two-sided; None where scores are not 0 and 1.
    """

    value: float
    standard_error: float | None
    low: float
    high: float
    rose: int
    fell: int
    p: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def mean_of(scores: np.ndarray) -> Mean:
    """The mean of [N], with the standard error of independent items: s / √N."""
    size = len(scores)
    return Mean(float(scores.mean()), float(scores.std(ddof=1)) / math.sqrt(size) if size > 1 else None)


def mean_over_tasks(means: Sequence[Mean]) -> Mean:
    """The mean of tasks that count alike, whatever their number of items."""
    errors = [mean.standard_error for mean in means]
    known = [error for error in errors if error is not None]
    error = math.sqrt(sum(value**2 for value in known)) / len(means) if len(known) == len(errors) else None
    return Mean(sum(mean.value for mean in means) / len(means), error)


def difference(later: np.ndarray, earlier: np.ndarray, seed: int = 0) -> Difference:
    """Compare two models on one task's items, both [N]."""
    gaps = later - earlier
    low, high = np.percentile(_resampled_means(gaps, np.random.default_rng(seed)), _SIDES)
    rose, fell = int((gaps > 0).sum()), int((gaps < 0).sum())
    binary = bool(np.isin(later, (0.0, 1.0)).all() and np.isin(earlier, (0.0, 1.0)).all())
    of_gaps = mean_of(gaps)
    return Difference(
        of_gaps.value, of_gaps.standard_error, float(low), float(high), rose, fell,
        mcnemar(rose, fell) if binary else None,
    )  # fmt: skip


def difference_over_tasks(
    later: Mapping[str, np.ndarray], earlier: Mapping[str, np.ndarray], seed: int = 0
) -> Difference:
    """Compare the means over tasks; items are resampled within their tasks. No test of the flips of different tasks."""
    gaps = [later[task] - earlier[task] for task in later]
    rng = np.random.default_rng(seed)
    low, high = np.percentile(sum(_resampled_means(values, rng) for values in gaps) / len(gaps), _SIDES)
    mean = mean_over_tasks([mean_of(values) for values in gaps])
    rose, fell = (sum(int((sign * values > 0).sum()) for values in gaps) for sign in (1, -1))
    return Difference(mean.value, mean.standard_error, float(low), float(high), rose, fell, None)


def mcnemar(rose: int, fell: int) -> float:
    """Probability of so uneven flips, or more uneven ones, if either way were as likely: exact, two-sided.

    Source: McNemar 1947, Psychometrika 12; exact form: a binomial test with p = ½. In whole numbers, so that none is
    too small or too large.
    """
    flips, fewer = rose + fell, min(rose, fell)
    if rose == fell:
        return 1.0
    ways = term = 1
    for k in range(fewer):
        term = term * (flips - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / 2**flips)


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of R samples of N of the values, drawn with replacement, [R].

    Drawn as how often each distinct value comes up: the same distribution, without N × R numbers for scores of 0 and 1.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) == 1:
        return np.full(RESAMPLES, distinct[0])
    means = []
    step = max(1, _BLOCK // len(distinct))
    for first in range(0, RESAMPLES, step):
        drawn = rng.multinomial(len(values), counts / len(values), size=min(step, RESAMPLES - first))
        means.append(drawn @ distinct / len(values))
    return np.concatenate(means)

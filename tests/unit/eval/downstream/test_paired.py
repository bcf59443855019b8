"""Paired statistics in fp64, compared with scipy's tests and with a bootstrap that draws items one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdscale.eval.downstream.paired import (
    RESAMPLES,
    Mean,
    difference,
    difference_over_tasks,
    mcnemar,
    mean_of,
    mean_over_tasks,
)

stats = pytest.importorskip("scipy.stats")


def _models(items: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    earlier = (rng.random(items) < 0.6).astype(np.float64)
    flips = rng.random(items) < 0.15
    return np.where(flips & (rng.random(items) < 0.7), 1 - earlier, earlier), earlier


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test(rose: int, fell: int) -> None:
    expected = stats.binomtest(rose, rose + fell, 0.5).pvalue if rose + fell else 1.0
    assert mcnemar(rose, fell) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_very_many_flips_is_a_number() -> None:
    assert mcnemar(6000, 5000) == pytest.approx(stats.binomtest(6000, 11_000, 0.5).pvalue, rel=1e-9)
    assert mcnemar(9000, 0) == 0.0  # 2⁻⁸⁹⁹⁹, too small for a float


def test_a_mean_and_its_error() -> None:
    later, _ = _models()
    assert mean_of(later) == Mean(pytest.approx(later.mean()), pytest.approx(stats.sem(later)))
    assert mean_of(np.array([1.0])) == Mean(1.0, None)


def test_a_difference_is_paired() -> None:
    later, earlier = _models()
    gap = difference(later, earlier)
    assert gap.value == pytest.approx(later.mean() - earlier.mean())
    t = stats.ttest_rel(later, earlier)
    assert gap.value / gap.standard_error == pytest.approx(t.statistic)  # type: ignore[operator]
    assert (gap.rose, gap.fell) == (int((later > earlier).sum()), int((later < earlier).sum()))
    assert gap.p == pytest.approx(stats.binomtest(gap.rose, gap.rose + gap.fell, 0.5).pvalue)
    unpaired = math.hypot(stats.sem(later), stats.sem(earlier))
    assert gap.standard_error is not None and gap.standard_error < 0.6 * unpaired


@pytest.mark.parametrize("continuous", [False, True])
def test_the_interval_is_that_of_resampled_items(continuous: bool) -> None:
    later, earlier = _models(seed=3)
    if continuous:
        later = later + np.random.default_rng(1).normal(size=len(later))
    gap = difference(later, earlier, seed=5)
    rng = np.random.default_rng(9)
    values = later - earlier
    means = values[rng.integers(0, len(values), size=(RESAMPLES, len(values)))].mean(1)
    spread = means.std()
    assert gap.low == pytest.approx(np.percentile(means, 2.5), abs=0.08 * spread + 1 / len(values))
    assert gap.high == pytest.approx(np.percentile(means, 97.5), abs=0.08 * spread + 1 / len(values))
    assert gap == difference(later, earlier, seed=5)
    assert (gap.p is None) == continuous


def test_equal_models_do_not_differ() -> None:
    scores = np.array([1.0, 0.0, 1.0])
    gap = difference(scores, scores)
    assert (gap.value, gap.low, gap.high, gap.rose, gap.fell, gap.p) == (0.0, 0.0, 0.0, 0, 0, 1.0)


def test_tasks_count_alike_whatever_their_size() -> None:
    few, many = _models(150, seed=1), _models(2000, seed=2)
    assert mean_over_tasks([Mean(0.5, 0.03), Mean(1.0, 0.04)]) == Mean(0.75, pytest.approx(0.025))
    gap = difference_over_tasks({"a": few[0], "b": many[0]}, {"a": few[1], "b": many[1]})
    parts = [difference(*few), difference(*many)]
    assert gap.value == pytest.approx(sum(part.value for part in parts) / 2)
    assert gap.standard_error == pytest.approx(math.hypot(*(part.standard_error or 0 for part in parts)) / 2)
    assert gap.low < gap.value < gap.high
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * gap.standard_error, rel=0.1)  # type: ignore[operator]
    assert (gap.rose, gap.p) == (parts[0].rose + parts[1].rose, None)

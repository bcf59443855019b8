"""Blends: shares kept at any length, epochs of their own, and the same order for any rank, wherever a run resumes."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.data.batches import LoaderState, PackedLoader
from kdscale.data.blends import PERIOD, BlendOrder
from kdscale.data.packing import IGNORED_LABEL
from kdscale.errors import ConfigError, DataError

shares_lists = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6).map(lambda w: [x / sum(w) for x in w])


@settings(max_examples=40, deadline=None, database=None)
@given(shares_lists, st.integers(0, 3 * PERIOD))
def test_every_run_of_windows_has_the_shares(shares, first):
    order = BlendOrder(shares)
    placed = [order.place(number) for number in range(first, first + 300)]
    for length in (1, 7, 60, 300):
        counts = Counter(source for source, _ in placed[:length])
        for source, share in enumerate(shares):
            assert abs(counts[source] - share * length) < len(shares) + 0.01, "a run anywhere, not only from 0"
    for source in range(len(shares)):
        numbers = [within for other, within in placed if other == source]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


def test_from_the_start_each_source_is_within_about_a_window():
    shares = [0.5, 0.3, 0.15, 0.05]
    order, counts = BlendOrder(shares), [0] * 4
    for number in range(PERIOD + 500):
        source, within = order.place(number)
        assert within == counts[source]
        counts[source] += 1
        assert all(abs(count - share * (number + 1)) < 1.5 for count, share in zip(counts, shares, strict=True))
    assert order.counts == [32768, 19661, 9830, 3277]


def test_a_share_too_small_to_have_a_window_is_refused():
    with pytest.raises(ConfigError, match=r"data\.blend\.weights"):
        BlendOrder([1.0, 1e-9])


LENGTHS = [7, 30, 12, 19, 25, 44, 13, 9, 16, 28]
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
SHARES = {0: 0.5, 1: 0.3, 2: 0.2}


@pytest.fixture
def blend(make_split):
    return make_split(LENGTHS, labels=LABELS, shares=SHARES)


def test_each_source_has_epochs_of_its_own(blend):
    """All tokens of a source but the tail are read once before any is read twice, whatever the others do."""
    loader = PackedLoader(blend, 8, 1, 1, seed=3)
    windows = [loader.sequence(number) for number in range(200)]
    for source, share in SHARES.items():
        own = [window for window in windows if window.tags_S[0] == source]
        assert abs(len(own) - 200 * share) <= 1.5
        size = sum(length for length, label in zip(LENGTHS, LABELS, strict=True) if label == source)
        epochs = [own[first : first + size // 8] for first in range(0, len(own) - size // 8, size // 8)]
        orders = [[token for window in epoch for token in window.input_ids_S.tolist()] for epoch in epochs]
        assert all(len(set(order)) == len(order) for order in orders)
        assert len({tuple(order) for order in orders}) > 1, "not the same order each epoch"
    assert all(len(set(window.tags_S.tolist())) == 1 for window in windows), "a window is of one source"


def test_order_and_position_survive_a_kill_and_another_number_of_ranks(blend):
    def rows(loaders, state, steps):
        """Each step's rows in the order of the ranks, and the state after them."""
        streams = [loader.batches(state) for loader in loaders]
        for parts in islice(zip(*streams, strict=True), steps):
            ids = np.concatenate([batch.input_ids_BS.numpy() for batches, _ in parts for batch in batches])
            labels = np.concatenate([batch.labels_BS.numpy() for batches, _ in parts for batch in batches])
            yield np.stack((ids, labels)).tolist(), parts[0][1]

    def loaders(world, micro, seed):
        return [PackedLoader(blend, 8, 8, micro, seed=seed, rank=rank, world=world) for rank in range(world)]

    @settings(max_examples=15, deadline=None, database=None)
    @given(st.integers(0, 2**32), st.integers(0, 9), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))
    def check(seed, stop, before, after):
        whole = list(rows(loaders(1, 8, seed), LoaderState(), 10))
        first = list(rows(loaders(before, 8 // before, seed), LoaderState(), stop))
        state = LoaderState.from_json((first[-1][1] if first else LoaderState()).to_json())
        rest = list(rows(loaders(after, 2, seed), state, 10 - stop))
        assert [step for step, _ in first + rest] == [step for step, _ in whole]

    check()


def test_a_source_without_a_window_is_named(make_split):
    split = make_split([30, 5], labels=[0, 1], shares={0: 0.5, 1: 0.5})
    with pytest.raises(DataError, match=r"source1 in data\.blend has 5 tokens"):
        PackedLoader(split, 8, 1, 1, seed=0)


def test_what_stands_for_a_blend_has_its_shares(blend):
    loader = PackedLoader(blend, 8, 1, 1, seed=0)
    everything = range(loader.epoch_sequences)
    chosen = loader.spread(everything, 10)
    tags = Counter(int(loader.sequence(number).tags_S[0]) for number in chosen)
    assert [tags[source] for source in SHARES] == [5, 3, 2]
    assert loader.spread(chosen, 4, halfway=True) == chosen[:4]
    assert (loader.step(0)[0].labels_BS != IGNORED_LABEL).any()

"""Packing as properties: which tokens, which labels, which positions, for any documents, windows and seeds."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.data.packing import IGNORED_LABEL, EpochOrder, epoch_sequences, packed_sequence, seeded_order
from kdscale.errors import DataError

lengths_lists = st.lists(st.integers(2, 40), min_size=1, max_size=12)
seeds, epochs, seq_lens = st.integers(0, 2**63), st.integers(0, 5), st.integers(1, 30)

PINNED_00 = [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]
PINNED_01 = [8, 3, 0, 1, 5, 2, 7, 4, 9, 6]
PINNED_10 = [2, 5, 8, 9, 1, 4, 6, 0, 3, 7]


def windows(split, seed, epoch, seq_len):
    order = EpochOrder(split, seed, epoch)
    return [packed_sequence(split, order, i, seq_len) for i in range(sum(split.lengths * split.weights_D) // seq_len)]


def test_every_token_once_an_epoch_but_the_tail(make_split):
    @settings(max_examples=80, deadline=None, database=None)
    @given(lengths_lists, st.data(), seeds, epochs, seq_lens)
    def check(lengths, data, seed, epoch, seq_len):
        weights = data.draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths)))
        split = make_split(lengths, weights)
        seen = Counter(int(t) for w in windows(split, seed, epoch, seq_len) for t in w.input_ids_S)
        full = Counter({int(t): weights[d] for d in range(len(lengths)) for t in split.document_tokens(d)})
        assert not seen - full
        assert (full - seen).total() == full.total() % seq_len

    check()


def test_labels_and_positions(make_split):
    @settings(max_examples=80, deadline=None, database=None)
    @given(lengths_lists, seeds, epochs, seq_lens)
    def check(lengths, seed, epoch, seq_len):
        for window in windows(make_split(lengths), seed, epoch, seq_len):
            documents = []
            for t, (token, position, label) in enumerate(zip(*window[:3], strict=True)):
                document, k = divmod(int(token), 1000)
                last = k == lengths[document - 1] - 1
                assert label == (IGNORED_LABEL if last else token + 1), "the next token of the same document"
                starts = t == 0 or k == 0
                assert position == (0 if starts else window.position_ids_S[t - 1] + 1)
                documents += [document - 1] if starts else []
            assert window.document_ids == documents
            assert all(a.dtype == np.int64 for a in window[:3])

    check()


def test_what_is_no_label_is_read_and_not_predicted(make_split):
    @settings(max_examples=80, deadline=None, database=None)
    @given(lengths_lists, st.data(), seeds, seq_lens)
    def check(lengths, data, seed, seq_len):
        is_label = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
        split, plain = make_split(lengths, is_label=is_label), make_split(lengths)
        known = dict(zip(split.tokens_T.tolist(), is_label, strict=True))
        for window, whole in zip(windows(split, seed, 0, seq_len), windows(plain, seed, 0, seq_len), strict=True):
            assert window.input_ids_S.tolist() == whole.input_ids_S.tolist()
            expected = [label if known.get(label) else IGNORED_LABEL for label in whole.labels_S.tolist()]
            assert window.labels_S.tolist() == expected

    check()


def test_every_position_has_the_tag_of_its_document(make_split):
    split = make_split([7, 30, 2, 12], labels=[0, 1, 2, 1], prefix_ids=(1,))
    order = EpochOrder(split, 0, 0)
    for number in range(epoch_sequences(split, 9)):
        window = packed_sequence(split, order, number, 9)
        for token, tag in zip(window.input_ids_S.tolist(), window.tags_S.tolist(), strict=True):
            assert token == 1 or split.tags_D[token // 1000 - 1] == tag


def test_window_cuts_keep_the_label_across_the_edge(make_split):
    """A document longer than the window loses no target: all but its first token are labels once."""
    split = make_split([50])
    order = EpochOrder(split, 0, 0)
    labels = np.concatenate([packed_sequence(split, order, i, 10).labels_S for i in range(5)])
    assert labels.tolist() == [*range(1001, 1050), IGNORED_LABEL]


def test_a_prefix_begins_every_document_and_window_and_changes_no_label(make_split):
    """With BOS the same labels are learned once each, and the text of every document is there in full."""

    @settings(max_examples=80, deadline=None, database=None)
    @given(lengths_lists, seeds, epochs, st.integers(1, 3), st.integers(1, 30))
    def check(lengths, seed, epoch, size, width):
        split, seq_len = make_split(lengths, prefix_ids=tuple(range(1, size + 1))), size + width
        if sum(lengths) + size * len(lengths) < seq_len:
            return
        order = EpochOrder(split, seed, epoch)
        labels = Counter()
        for number in range(epoch_sequences(split, seq_len)):
            ids, positions, wanted, *_ = packed_sequence(split, order, number, seq_len)
            assert positions[0] == 0
            for position, token, label in zip(positions, ids, wanted, strict=True):
                assert (token == position + 1) == (position < size), "every run begins with the whole prefix"
                assert label in (IGNORED_LABEL, token + 1)
                assert position >= size or label == IGNORED_LABEL
                labels[int(label)] += label != IGNORED_LABEL
        expected = {1000 * (d + 1) + k for d, n in enumerate(lengths) for k in range(1, n)}
        seen = {label for label, count in labels.items() if count}
        assert all(count <= 1 for count in labels.values())
        assert seen <= expected
        assert len(expected - seen) <= seq_len

    check()


def test_a_window_needs_room_beside_the_prefix(make_split):
    with pytest.raises(DataError, match="no room for text"):
        epoch_sequences(make_split([9], prefix_ids=(1, 2)), 2)


def test_order_is_a_permutation_pinned_for_ever():
    assert seeded_order(10, 0, 0).tolist() == PINNED_00
    assert seeded_order(10, 0, 1).tolist() == PINNED_01
    assert seeded_order(10, 1, 0).tolist() == PINNED_10
    for seed in (0, 1, 2**64 - 1):
        assert sorted(seeded_order(1000, seed, 3)) == list(range(1000))


def test_order_mixes():
    order = seeded_order(4000, 5, 0)
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.05
    assert sum(b == a + 1 for a, b in pairwise(order)) < 10


def test_too_little_text(make_split):
    assert epoch_sequences(make_split([5, 5]), 10) == 1
    with pytest.raises(DataError, match=r"10 tokens(.|\n)*sequence of 11"):
        epoch_sequences(make_split([5, 5]), 11)

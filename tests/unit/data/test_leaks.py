"""The leak check: the runs that two texts share, against a search by hand, and what the store does with them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.data import leaks
from kdscale.data.leaks import Text, find_leaks, in_words

documents_lists = st.lists(st.lists(st.integers(0, 2), max_size=14), min_size=1, max_size=8)


def text_of(documents: list[list[int]]) -> Text:
    flat = np.asarray([token for document in documents for token in document], np.uint16)
    return Text(flat, np.cumsum([0, *map(len, documents)]))


def runs_of(document: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(document[i : i + size]) for i in range(len(document) - size + 1)]


def test_it_finds_what_a_search_by_hand_finds(monkeypatch):
    @settings(max_examples=120, deadline=None, database=None)
    @given(documents_lists, documents_lists, st.integers(4, 9), st.integers(1, 30))
    def check(train, evaluation, size, block):
        monkeypatch.setattr(leaks, "_BLOCK_TOKENS", block)
        known = {run for document in evaluation for run in runs_of(document, size)}
        has = [i for i, document in enumerate(train) if known & set(runs_of(document, size))]
        in_train = {run for document in train for run in runs_of(document, size)}
        covered = {
            (d, i + k)
            for d, document in enumerate(evaluation)
            for i, run in enumerate(runs_of(document, size))
            if run in in_train
            for k in range(size)
        }
        halves = [text_of(evaluation[:3]), text_of(evaluation[3:])]
        found = find_leaks(text_of(train), halves, size)
        assert found.documents.tolist() == has
        assert found.covered == pytest.approx(len(covered) / max(1, sum(map(len, evaluation))))
        assert [leak.document for leak in found.examples] == has[:5]
        flat = text_of(train).tokens_T.tolist()
        for leak in found.examples:
            assert tuple(flat[leak.first : leak.first + size]) in known
            assert leak.size >= size

    check()


def test_an_example_is_the_whole_passage():
    train = text_of([[9] * 5, [*range(10, 40)], [7] * 9])
    found = find_leaks(train, [text_of([[*range(100, 110), *range(15, 33), *range(200, 210)]])], 13)
    (leak,) = found.examples
    assert train.tokens_T[leak.first : leak.first + leak.size].tolist() == list(range(15, 33))
    facts = found.facts(train, 13, lambda ids: " ".join(map(str, ids)))
    assert facts["documents"] == 1 and facts["covered"] == pytest.approx(18 / 38)
    assert "47.37% of the evaluation text" in in_words(facts)[0] and "15 16" in in_words(facts)[1]

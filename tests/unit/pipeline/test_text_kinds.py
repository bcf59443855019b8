"""Kinds of text: words that differ beyond chance, whatever the samples' sizes, and sources that a sample lacks."""

from __future__ import annotations

import numpy as np
import pytest

from kdscale.pipeline.text_kinds import LIMIT_NATS, missing_sources, unlikeness


def rows(count: int, seed: int, first_word: int = 0, length: int = 256) -> list[np.ndarray]:
    """Sequences whose words have Zipf's frequencies; `first_word` numbers the most frequent one."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 2001)
    return [first_word + rng.choice(2000, length, p=shares / shares.sum()) for _ in range(count)]


@pytest.mark.parametrize(("few", "many"), [(2, 64), (8, 8), (24, 64)])
def test_samples_of_one_kind_are_as_far_apart_as_chance_has_it(few: int, many: int) -> None:
    found = unlikeness(rows(few, 1), rows(many, 2))
    assert not found.differ and abs(found.beyond_chance) < LIMIT_NATS
    assert found.distance > 2 * LIMIT_NATS or few > 8, "small samples are far apart all the same"


def test_samples_of_two_kinds_differ_in_either_order() -> None:
    one, other = rows(24, 1), rows(24, 2, first_word=40)
    for found in (unlikeness(one, other), unlikeness(other, one), unlikeness(one + other, other * 2)):
        assert found.differ and found.beyond_chance > LIMIT_NATS
    assert unlikeness(one, other) == unlikeness(one, other), "the same shuffles every time"


def test_text_that_keeps_its_words_together_is_no_kind_of_its_own() -> None:
    """Each document repeats some words: between documents that is much, between two samples of them chance."""
    documents = [
        np.concatenate([row, np.repeat(5000 + 100 * n + np.arange(8), 32)]) for n, row in enumerate(rows(32, 3))
    ]
    assert not unlikeness(documents[::2], documents[1::2]).differ


def test_a_sample_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        unlikeness([np.array([], int)], rows(1, 1))


def test_a_source_is_missing_where_it_has_hardly_a_part_of_its_share() -> None:
    text = {"news": 600, "code": 300, "poems": 60, "mail": 40}
    assert missing_sources({"news": 9, "code": 1}, text) == {"poems": (0.06, 0.0)}, "a rare source may be missed"
    assert missing_sources({"news": 10}, text) == {"code": (0.3, 0.0), "poems": (0.06, 0.0)}
    assert missing_sources({"news": 6, "code": 3, "poems": 1}, text) == {}
    assert missing_sources({}, {}) == {}

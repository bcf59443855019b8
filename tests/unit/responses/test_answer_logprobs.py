"""Which positions of an answer have targets, and finding them again in packed text that is cut anywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdscale.data.packing import IGNORED_LABEL
from kdscale.responses.answer_logprobs import AnswerIndex, Place, places_of, target_numbers, with_rest

IDS = {"He": 1, "llo": 2, " ": 3, "you": 4, "Hello": 5, "é": 6}


def said(*tokens: str) -> list[list[object]]:
    return [[token, [[token, -0.5], ["you", -1.5], ["never seen", -0.1]]] for token in tokens]


def test_targets_are_where_both_tokenizers_cut_alike() -> None:
    """The conversation is "Q: Hé you" in the tokens Q: |H|é| |you; the endpoint's tokens are Hé| |you|<end>."""
    bytes_T = np.asarray([3, 1, 2, 1, 3])
    places = places_of("Hé you", said("Hé", " ", "you", "<end>"), 3, bytes_T, IDS)
    assert places == [Place(2, [(3, -0.5), (4, -1.5)]), Place(3, [(4, -0.5)])]


@pytest.mark.parametrize(
    ("tokens", "likely"),
    [(("other", " text"), [["you", -0.5]]), (("Hé", " ", "you"), [["you", 0.0], ["He", -0.1]])],
    ids=["another text", "no probabilities"],
)
def test_what_is_not_about_the_answer_is_left_out(tokens: tuple[str, ...], likely: list[list[object]]) -> None:
    assert places_of("Hé you", [[token, likely] for token in tokens], 0, np.asarray([3, 1, 3]), IDS) == []


def test_what_is_not_known_of_the_top_k_has_an_even_share_of_the_rest() -> None:
    entries = with_rest([(7, math.log(0.5)), (2, math.log(0.25))], 4, 10)
    assert [token for token, _ in entries] == [7, 2, 0, 1]
    assert [math.exp(logprob) for _, logprob in entries] == pytest.approx([0.5, 0.25, 0.25 / 8, 0.25 / 8])
    assert with_rest([(1, -2.0), (4, -1.0), (5, -3.0)], 2, 10) == [(4, -1.0), (1, -2.0)]


CONVERSATIONS = [np.arange(10, 40), np.concatenate([np.arange(10, 22), np.arange(60, 90)])]  # the first 12 are alike


@pytest.fixture(scope="module")
def index() -> AnswerIndex:
    """Targets of every position from 11 on whose number is odd; the target of conversation c there is 1000·c + it."""
    chats = [
        (ids, [Place(at, [(1, math.log(0.5))]) for at in range(11, len(ids) - 1) if at % 2])
        for ids in CONVERSATIONS
    ]  # fmt: skip
    return AnswerIndex.of(chats, 2, 100)


def window(*documents: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and labels of documents, each `(conversation or -1, first, last)`, with one token before each."""
    ids, positions, labels = [], [], []
    for conversation, first, last in documents:
        whole = np.append(CONVERSATIONS[conversation] if conversation >= 0 else np.arange(200, 300), 7)
        ids += [0, *whole[first:last].tolist()]
        positions += range(last - first + 1)
        labels += [IGNORED_LABEL, *np.append(whole, IGNORED_LABEL)[first + 1 : last + 1].tolist()]
    return torch.tensor([ids]), torch.tensor([positions]), torch.tensor([labels])


def test_rows_are_found_by_all_of_their_document(index: AnswerIndex) -> None:
    """Whole documents, one with its end token; a part that begins a window in the middle; and other text."""
    ids_BS, positions_BS, labels_BS = window((0, 0, 31), (-1, 5, 30), (1, 0, 20), (1, 15, 40))
    numbers_M = target_numbers(index, 1, ids_BS, positions_BS, labels_BS)
    of_first = [at for at in range(11, 29) if at % 2]
    of_second = [at for at in range(11, 41) if at % 2]
    want = np.full(ids_BS.numel(), -1)
    begin = 1
    want[[begin + at for at in of_first]] = np.arange(len(of_first))
    begin += 31 + 26 + 1
    seen = [at for at in of_second if at < 20]
    want[[begin + at for at in seen]] = len(of_first) + np.arange(len(seen))
    begin += 21
    seen = [at for at in of_second if 15 <= at < 40]
    want[[begin + at - 15 for at in seen]] = len(of_first) + np.asarray([of_second.index(at) for at in seen])
    assert numbers_M.tolist() == want.tolist()


def test_other_text_after_the_same_words_has_no_targets(index: AnswerIndex) -> None:
    ids_BS, positions_BS, labels_BS = window((0, 0, 30))
    ids_BS[0, 5] = 99
    assert (target_numbers(index, 1, ids_BS, positions_BS, labels_BS) == -1).all()


def test_labels_that_are_ignored_or_others_have_no_targets(index: AnswerIndex) -> None:
    ids_BS, positions_BS, labels_BS = window((0, 0, 30))
    labels_BS[0, 1 + 13], labels_BS[0, 1 + 15] = IGNORED_LABEL, 5
    numbers_M = target_numbers(index, 1, ids_BS, positions_BS, labels_BS)
    assert (numbers_M[[14, 16]] == -1).all() and numbers_M[1 + 17] == 3

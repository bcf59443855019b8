"""Answers to prompts as sequences: one document after another, of which the answers' tokens are labels.

S positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdscale.data.batches import NO_ANSWER, Batch, SequenceKey, WrittenSequence, stack_written
from kdscale.data.packing import IGNORED_LABEL, PackedSequence


class Answer(NamedTuple):
    """Token ids of a prompt and of an answer to it, and of each token of the answer how likely it was then, or 0.

    `number` in the sequence: 2k and 2k + 1 are a pair, where answers are compared. `learnt`: the places in the answer
    that are labels; None: all. `tag`: of the text that the prompt comes from.
    """

    number: int
    prompt: Sequence[int] | np.ndarray
    ids: Sequence[int] | np.ndarray
    logprobs: Sequence[float] | None = None
    learnt: Sequence[int] | None = None
    tag: int = 0


def pack_answers(answers: Sequence[Answer], size: int, pad_id: int) -> WrittenSequence:
    """A sequence of `size` positions; what is left of it is filled with `pad_id`, of which nothing is learnt."""
    at = 0
    ids, labels = np.full(size, pad_id, np.int64), np.full(size, IGNORED_LABEL, np.int64)
    positions, tags = np.zeros(size, np.int64), np.zeros(size, np.int64)
    logprobs, numbers = np.zeros(size, np.float32), np.full(size, NO_ANSWER, np.int64)
    for answer in answers:
        begin, end = at + len(answer.prompt), at + len(answer.prompt) + len(answer.ids)
        ids[at:end] = [*answer.prompt, *answer.ids]
        positions[at:end], tags[at:end] = np.arange(end - at), answer.tag
        learnt = np.asarray(range(len(answer.ids)) if answer.learnt is None else answer.learnt, np.int64)
        rows = begin - 1 + learnt  # each token is learnt where the one before it stands
        labels[rows], numbers[rows] = np.asarray(answer.ids, np.int64)[learnt], answer.number
        if answer.logprobs is not None:
            logprobs[rows] = np.asarray(answer.logprobs, np.float32)[learnt]
        at = end
    positions[at:] = np.arange(size - at)  # a document of its own
    return WrittenSequence(PackedSequence(ids, positions, labels, tags, []), logprobs, numbers)


def held_out_batch(numbered: Sequence[tuple[int, WrittenSequence]]) -> Batch:
    """A batch of sequences to measure on, each with its number; there is at least one."""
    keys, written = zip(*((SequenceKey("on_policy_heldout", number), one) for number, one in numbered), strict=True)
    return stack_written(written, keys, [True] * len(written))

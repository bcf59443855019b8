"""Batches of packed sequences: for training (resumable, the same for any number of processes) and for measuring.

The global order is an endless list of sequences, epoch after epoch; optimiser step n takes the sequences
n·global_batch … (n+1)·global_batch − 1, and each rank takes one run of these, in the order of the ranks. Which tokens a
step trains on therefore depends on nothing but (split, seed, seq_len, global_batch, n), and the loader's state is n.

Of a blend, each sequence is of one source, and each source has its own epochs; data/blends.py has the order.

Dimension letters: B sequences, S seq_len.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kdscale.config.distill.masking import EncoderTask
from kdscale.data.blends import BlendOrder
from kdscale.data.encoders.classes import for_task
from kdscale.data.encoders.masking import check_task
from kdscale.data.encoders.whole_documents import DocumentRows
from kdscale.data.packing import IGNORED_LABEL, PackedSequence, Windows
from kdscale.data.token_store import Share, TokenSplit
from kdscale.errors import ConfigError, DataError


class SequenceKey(NamedTuple):
    """Which sequence: `number` in the order in which the split ("train" or "heldout") is read."""

    split: str
    number: int


NO_ANSWER = -1


class WrittenSequence(NamedTuple):
    """A sequence in place of text: answers that the student wrote, or that were given.

    `logprobs_S`: the log-probabilities of its labels when it wrote them, 0 elsewhere. `answers_S`: the number of the
    answer that each label belongs to, NO_ANSWER elsewhere; of pairs the numbers 2k and 2k + 1 are one.
    """

    packed: PackedSequence
    logprobs_S: np.ndarray
    answers_S: np.ndarray


@dataclass(frozen=True)
class OwnText:
    """Which sequences of a batch stand in place of text, (B,) bool, and (B, S) what WrittenSequence has of all."""

    is_own_B: Tensor
    logprobs_BS: Tensor
    answers_BS: Tensor


class OwnSequences(Protocol):
    """What the student writes in place of sequences of the text."""

    def takes(self, number: int, step: int) -> bool:
        """Whether it writes sequence `number` of the global order, which belongs to step `step`."""

    def sequence(self, number: int, step: int) -> WrittenSequence:
        """What it wrote, which must be there."""

    def lengths(self) -> list[int]:
        """Positions of each document in a sequence of this kind, about."""


@dataclass(frozen=True)
class Batch:
    """Int64 tensors (B, S); labels[b, t] is the token that follows input_ids[b, t], or IGNORED_LABEL.

    Of an encoder's text labels[b, t] is the token at t itself, which input_ids may hide (data/encoders/masking.py), or
    the class of the document that begins at t (data/encoders/classes.py).

    tags[b, t] numbers the tag of the source that the position's document comes from, in TokenSplit.tags.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    labels_BS: Tensor
    tags_BS: Tensor
    document_ids: list[int]  # of all rows, in order; a document on two rows appears twice
    text_bytes: int = 0  # UTF-8 bytes of the text of the labels; only eval_batches fills it in
    sequences: tuple[SequenceKey, ...] = ()  # of the rows, in order
    step: int | None = None  # the optimiser step that trains on it, from 0; None: it is measured on
    own: OwnText | None = None  # which sequences the student wrote; None: none of them

    @property
    def token_count(self) -> int:
        """How many labels are not ignored."""
        return int((self.labels_BS != IGNORED_LABEL).sum())

    @property
    def sequence_count(self) -> int:
        """How many sequences have a label that is not ignored."""
        return int((self.labels_BS != IGNORED_LABEL).any(1).sum())

    @property
    def own_counts(self) -> tuple[int, int, int]:
        """`token_count`, `sequence_count` and pairs of answers of the sequences that stand in place of text."""
        if self.own is None:
            return 0, 0, 0
        labelled_BS = (self.labels_BS != IGNORED_LABEL) & self.own.is_own_B[:, None]
        answers = [set(row.tolist()) - {NO_ANSWER} for row in self.own.answers_BS]
        pairs = sum(number % 2 == 0 and number + 1 in found for found in answers for number in found)
        return int(labelled_BS.sum()), int(labelled_BS.any(1).sum()), pairs

    def with_labels_of(self, choose: Callable[[Batch, Sequence[SequenceKey]], Tensor] | None) -> Batch:
        """The same sequences with the labels [B, S] that `choose` takes of them; None: all."""
        return self if choose is None else replace(self, labels_BS=choose(self, self.sequences))

    def with_label_slice(self, number: int, slices: int) -> Batch:
        """The same sequences with only the labels of slice `number` of `slices` equal runs of positions.

        Ranks that share a sequence hold all of its tokens, and each of them one slice of its labels.
        """
        if slices == 1:
            return self
        width = self.labels_BS.shape[1] // slices
        labels_BS = torch.full_like(self.labels_BS, IGNORED_LABEL)
        positions = slice(number * width, (number + 1) * width)
        labels_BS[:, positions] = self.labels_BS[:, positions]
        return replace(self, labels_BS=labels_BS)


@dataclass(frozen=True)
class LoaderState:
    """Where a loader is: optimiser steps already taken."""

    step: int = 0

    def to_json(self) -> dict[str, int]:
        """For a checkpoint's manifest."""
        return {"step": self.step}

    @classmethod
    def from_json(cls, value: dict[str, int]) -> LoaderState:
        """What `to_json` gave. Raises DataError for anything else."""
        step = value.get("step") if isinstance(value, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0 or len(value) != 1:
            raise DataError("the data loader's saved state is damaged", expected='{"step": n}', got=repr(value))
        return cls(step)


class PackedLoader:
    """Training batches of one of `world` ranks, each of which takes an equal run of every step's sequences.

    `label_slice` (number, of how many) says which of their labels are its own. `choose_labels` takes a batch and the
    keys of its sequences, and returns the labels [B, S] to train on, the others ignored. `task`: what an encoder is
    to tell. `shorter_first` are phases,
    (first step after it, length), in which sequences are shorter and as many more: sequence n of a phase begins about
    where sequence n of that length would be, had the whole run that length. Raises ConfigError when the batch does not
    divide by the ranks, and DataError when there is less than one sequence of text.
    """

    def __init__(
        self,
        split: TokenSplit,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        label_slice: tuple[int, int] = (0, 1),
        choose_labels: Callable[[Batch, Sequence[SequenceKey]], Tensor] | None = None,
        shorter_first: Sequence[tuple[int, int]] = (),
        own: OwnSequences | None = None,
        task: EncoderTask | None = None,
    ):
        if not 0 <= rank < world:
            raise ConfigError("rank of the data loader", expected=f"0 to {world - 1}", got=str(rank))
        if global_batch % (micro_batch * world):
            raise ConfigError(
                "distill.global_batch",
                expected=f"a multiple of micro_batch × processes ({micro_batch} × {world})",
                got=str(global_batch),
            )
        self._split, self._seq_len, self._seed, self._shuffle = split, seq_len, seed, shuffle
        self._global, self._micro, self._rank, self._world = global_batch, micro_batch, rank, world
        check_task(split.encoder, task)
        self._label_slice, self._choose_labels, self._own, self._task = label_slice, choose_labels, own, task
        self._blend = BlendOrder([share.share for share in split.blend]) if split.blend else None
        self._streams = [self._stream(share) for share in split.blend or (None,)]
        self.epoch_sequences = sum(stream.sequences for stream in self._streams)
        self._shorter = [
            (end, PackedLoader(split, length, global_batch * more, micro_batch * more, seed, rank, world, shuffle,
                               label_slice, choose_labels, task=task))
            for end, length in shorter_first
            for more in [seq_len // length]
        ]  # fmt: skip

    def batches(self, state: LoaderState | None = None) -> Iterator[tuple[list[Batch], LoaderState]]:
        """The micro-batches of each optimiser step and the state after it, without end."""
        step = (state or LoaderState()).step
        while True:
            yield self.step(step), LoaderState(step + 1)
            step += 1

    def at(self, step: int) -> PackedLoader:
        """The loader of the phase that optimiser step `step` is in: this one after the shorter sequences."""
        return next((loader for end, loader in self._shorter if step < end), self)

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimiser step `step`."""
        if (phase := self.at(step)) is not self:
            return phase.step(step)
        per_rank = self._global // self._world
        first = step * self._global + self._rank * per_rank
        return [
            self.stack(range(number, number + self._micro), step).with_label_slice(*self._label_slice)
            for number in range(first, first + per_rank, self._micro)
        ]

    def describe(self, step: int) -> list[dict[str, Any]]:
        """The sequences of all ranks' batch of optimiser step `step`: number, labels, documents and their sources."""
        if (phase := self.at(step)) is not self:
            return phase.describe(step)
        out = []
        for number in range(step * self._global, (step + 1) * self._global):
            own = self._own if self._is_own(number, step) else None
            sequence = self.sequence(number) if own is None else own.sequence(number, step).packed
            out.append(
                {
                    "number": number,
                    "labels": int((sequence.labels_S != IGNORED_LABEL).sum()),
                    "documents": list(sequence.document_ids),
                    "sources": [self._split.source_labels[self._split.labels_D[i]] for i in sequence.document_ids],
                }
            )
        return out

    def spread(self, numbers: Sequence[int], count: int, halfway: bool = False) -> list[int]:
        """`count` of these sequences that stand for all: in even steps (or `halfway` between), or a blend's first ones.

        The beginning of a blend has its shares already, and even steps through its regular order may miss a source.
        """
        if self._blend is not None:
            return list(numbers[:count])
        return [numbers[(2 * index + halfway) * len(numbers) // (2 * count)] for index in range(count)]

    def stack(self, numbers: Sequence[int], step: int | None = None) -> Batch:
        """One batch of the sequences with these numbers in the global order, on which optimiser step `step` trains."""
        if not any(self._is_own(number, step) for number in numbers):
            keys = [SequenceKey("train", number) for number in numbers]
            batch = stack_sequences([self.sequence(number) for number in numbers], keys, step=step)
            return batch.with_labels_of(self._choose_labels)
        assert self._own is not None and step is not None
        is_own = [self._own.takes(number, step) for number in numbers]
        written = [
            self._own.sequence(number, step) if own else without_logprobs(self.sequence(number))
            for number, own in zip(numbers, is_own, strict=True)
        ]
        keys = [SequenceKey("on_policy" if own else "train", n) for n, own in zip(numbers, is_own, strict=True)]
        return stack_written(written, keys, is_own, step)

    def _is_own(self, number: int, step: int | None) -> bool:
        return self._own is not None and step is not None and self._own.takes(number, step)

    def sequence(self, number: int) -> PackedSequence:
        """Sequence `number` of the endless global order."""
        stream, epoch, within = self._place(number)
        return for_task(stream.sequence(epoch, within), self._split, self._task, ("train", number), self._seed)

    def document_lengths(self, step: int) -> list[int]:
        """Positions of every document in all ranks' batch of optimiser step `step`; reads no tokens."""
        if (phase := self.at(step)) is not self:
            return phase.document_lengths(step)
        numbers = range(step * self._global, (step + 1) * self._global)
        windows = (
            self._own.lengths() if self._own is not None and self._own.takes(number, step) else self._lengths(number)
            for number in numbers
        )
        return [length for window in windows for length in window]

    def _place(self, number: int) -> tuple[_Stream, int, int]:
        """The stream that sequence `number` is of, its epoch, and its number there."""
        chosen, number = (0, number) if self._blend is None else self._blend.place(number)
        stream = self._streams[chosen]
        return stream, *divmod(number, stream.sequences)

    def _lengths(self, number: int) -> list[int]:
        stream, epoch, within = self._place(number)
        return stream.lengths(epoch, within)

    def _stream(self, share: Share | None) -> _Stream:
        """Documents that have epochs of their own: those of a share of a blend, or all of the split."""
        documents = None if share is None else self._split.documents_of(share)
        if self._split.encoder is not None:
            return DocumentRows(self._split, self._seq_len, self._seed, self._shuffle, documents)
        what = "the training text" if share is None else f"the training text of {share.name} in data.blend"
        return Windows(self._split, self._seq_len, self._seed, self._shuffle, documents, what)


class _Stream(Protocol):
    """Epoch after epoch of sequences, as many in each."""

    @property
    def sequences(self) -> int: ...

    def sequence(self, epoch: int, number: int, /) -> PackedSequence: ...

    def lengths(self, epoch: int, number: int, /) -> list[int]: ...


def stack_sequences(
    sequences: Sequence[PackedSequence],
    keys: Sequence[SequenceKey] = (),
    text_bytes: int = 0,
    step: int | None = None,
) -> Batch:
    """One batch of these sequences, in their order."""
    return Batch(
        input_ids_BS=torch.from_numpy(np.stack([s.input_ids_S for s in sequences])),
        position_ids_BS=torch.from_numpy(np.stack([s.position_ids_S for s in sequences])),
        labels_BS=torch.from_numpy(np.stack([s.labels_S for s in sequences])),
        tags_BS=torch.from_numpy(np.stack([s.tags_S for s in sequences])),
        document_ids=[document for s in sequences for document in s.document_ids],
        text_bytes=text_bytes,
        sequences=tuple(keys),
        step=step,
    )


def without_logprobs(packed: PackedSequence) -> WrittenSequence:
    """A sequence of the run's text beside those that the student wrote."""
    size = len(packed.labels_S)
    return WrittenSequence(packed, np.zeros(size, np.float32), np.full(size, NO_ANSWER, np.int64))


def stack_written(
    sequences: Sequence[WrittenSequence], keys: Sequence[SequenceKey], is_own: Sequence[bool], step: int | None = None
) -> Batch:
    """One batch of these sequences, of which the student wrote those that `is_own` says."""
    batch = stack_sequences([sequence.packed for sequence in sequences], keys, step=step)
    logprobs_BS, answers_BS = (
        torch.from_numpy(np.stack([getattr(sequence, name) for sequence in sequences]))
        for name in ("logprobs_S", "answers_S")
    )
    return replace(batch, own=OwnText(torch.tensor(is_own), logprobs_BS, answers_BS))


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of the sequences of all."""
    return Batch(
        input_ids_BS=torch.cat([batch.input_ids_BS for batch in batches]),
        position_ids_BS=torch.cat([batch.position_ids_BS for batch in batches]),
        labels_BS=torch.cat([batch.labels_BS for batch in batches]),
        tags_BS=torch.cat([batch.tags_BS for batch in batches]),
        document_ids=[document for batch in batches for document in batch.document_ids],
        text_bytes=sum(batch.text_bytes for batch in batches),
        sequences=tuple(key for batch in batches for key in batch.sequences),
    )

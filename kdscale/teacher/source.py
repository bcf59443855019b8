"""Sources of targets: whoever says what the student shall learn, in this process or elsewhere.

A new source is a row of config.distill.targets.SOURCES and a file with the function that the row names.

B sequences, S positions, N rows (flat positions with a label).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

import torch
from torch import nn

from kdscale.config.distill.targets import Needs
from kdscale.config.root import Config
from kdscale.models.documents import Documents
from kdscale.models.head import VocabShard
from kdscale.models.parameter_map import ParameterRange
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.teacher.targets import Targets, rows_of


@dataclass(frozen=True)
class MicroBatch:
    """Whole sequences on a device; `rows_N` are the flat positions that have a label on this rank.

    `sequences` says which sequences these are, by split ("train", "heldout") and number: the key of stored targets.
    `documents` are where the positions say; found there (waiting for the device) where the maker leaves them out.
    `tags_N` (int64, on the CPU) numbers the tag of each row's source in the token store's list of tags.
    `step`: the optimiser step that trains on them, for settings that follow a schedule; None: these are at their end.
    `is_own_N` (bool, on the CPU): rows of text that the student wrote, and `logprobs_N` (fp32) what it gave each label
    then, 0 elsewhere; `answers_N` (int64) numbers the answer that a row is of, among all of the batch: 2k and 2k + 1
    are a pair. None: there are none.
    """

    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    rows_N: torch.Tensor
    labels_N: torch.Tensor
    sequences: tuple[tuple[str, int], ...] = ()
    documents: Documents | None = None
    tags_N: torch.Tensor | None = None
    step: int | None = None
    is_own_N: torch.Tensor | None = None
    logprobs_N: torch.Tensor | None = None
    answers_N: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """N, without waiting for the device."""
        return self.rows_N.numel()

    def part(self, index_M: torch.Tensor) -> MicroBatch:
        """The same sequences with only some of the rows; their numbers `index_M` are on the CPU."""
        rows_M, labels_M = (rows_of(tensor, index_M) for tensor in (self.rows_N, self.labels_N))
        tags_M = None if self.tags_N is None else self.tags_N[index_M]
        is_own_M = None if self.is_own_N is None else self.is_own_N[index_M]
        logprobs_M, answers_M = (
            None if tensor is None else rows_of(tensor, index_M) for tensor in (self.logprobs_N, self.answers_N)
        )
        return replace(
            self, rows_N=rows_M, labels_N=labels_M, tags_N=tags_M, is_own_N=is_own_M, logprobs_N=logprobs_M,
            answers_N=answers_M,
        )  # fmt: skip


def most_answers(length: int) -> int:
    """So many numbers of answers each sequence of `length` positions has: an even number, so that pairs stay pairs."""
    return length + length % 2


class StudentAverage(Protocol):
    """A teacher that is made of the student's weights, and is part of a checkpoint."""

    def follow(self, student: nn.Module) -> None:
        """Take in the weights that the student has after a step."""

    def values(self, span: ParameterRange) -> torch.Tensor:
        """A range of a parameter, fp32."""

    def load(self, fill: Callable[[ParameterRange, torch.Tensor], None]) -> None:
        """Take over the values of a checkpoint, which `fill` puts into the tensor that it is given."""


class TargetSource(Protocol):
    """What the training asks of a source of targets."""

    gives: Needs  # the parts that its Targets have
    model: Any  # the module whose layers are searched for a NaN; an empty one when the model is elsewhere

    def prefetch(self, batch: MicroBatch) -> None:
        """Learn that the targets of `batch` (on the CPU) will be asked for soon. A source may begin to work on them."""

    def targets(self, batch: MicroBatch) -> Targets:
        """The targets of the rows of `batch`, on its device. Raises LostRankError when the source is gone."""

    def close(self) -> None:
        """Free what the source holds; nothing is asked of it any more."""


@dataclass(frozen=True)
class SourceRequest:
    """What a source is opened with.

    `load_split` loads a model in parts, one for each tensor-parallel rank, and returns (model, rows of the whole head,
    this rank's part of the head); None when ranks do not share layers. `tags` are the token store's, in its order.
    """

    cfg: Config
    needs: Needs
    teacher_dir: Path
    run_dir: Path
    dtype: torch.dtype
    device: torch.device
    sequence_slice: SequenceSlice
    load_split: Callable[[Path], tuple[Any, int, VocabShard]] | None
    student_dir: Path
    tags: tuple[str, ...]


class LabelledText(Protocol):
    """Sequences with their labels and the tags of their sources, (B, S) int64 each, as data.batches.Batch has them."""

    @property
    def input_ids_BS(self) -> torch.Tensor: ...  # noqa: N802

    @property
    def position_ids_BS(self) -> torch.Tensor: ...  # noqa: N802

    @property
    def labels_BS(self) -> torch.Tensor: ...  # noqa: N802

    @property
    def tags_BS(self) -> torch.Tensor: ...  # noqa: N802


LabelChoice = Callable[[LabelledText, Sequence[tuple[str, int]]], torch.Tensor]


@dataclass(frozen=True)
class OpenedSource:
    """A source that is there, before student and teacher have agreed on a vocabulary.

    `start` takes the number of tokens that both know; `rows` is how many the teacher's head has, None without one.
    `choose_labels` takes sequences and their keys (split and number) and returns the labels [B, S] that have targets,
    the others ignored; None: all have. `average` is a teacher that follows the student. `take_student` is given the
    student's model before `start` is called; None: the source has a model of its own, or none.
    """

    rows: int | None
    start: Callable[[int], TargetSource]
    choose_labels: LabelChoice | None = None
    average: StudentAverage | None = None
    take_student: Callable[[Any], None] | None = None


class TextAlone:
    """The source of an objective that learns from the text's own tokens: there is no teacher, and no targets."""

    def __init__(self) -> None:
        self.model, self.gives = nn.Module(), Needs()

    def prefetch(self, batch: MicroBatch) -> None:
        """Do nothing."""

    def targets(self, batch: MicroBatch) -> Targets:
        """Targets without any part."""
        return Targets(rows=batch.rows)

    def close(self) -> None:
        """Do nothing."""


def open_text(request: SourceRequest) -> OpenedSource:
    """No teacher: the student's own vocabulary counts, and no file is read."""
    return OpenedSource(None, lambda vocab_size: TextAlone())


def open_source(request: SourceRequest) -> OpenedSource:
    """Open the source that the config chooses. A collective call.

    Raises ConfigError, CheckpointError or ServiceError when it cannot give the targets.
    """
    opened: OpenedSource = resolve_name(request.cfg.distill.source.open)(request)
    return opened

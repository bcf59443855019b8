"""What the student as it began gives the labels: a part of the targets that no teacher has.

It is a frozen copy of the pruned student, or the student without its adapters, where these alone are trained: no copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdscale.config.distill.targets import Needs
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.own_weights import BaseTeacher, StudentsBase
from kdscale.teacher.placement.placed import ReplicatedTeacher
from kdscale.teacher.source import MicroBatch, TargetSource
from kdscale.teacher.targets import Targets


class WithReference:
    """A source of targets, to which batches with pairs of answers get those of the reference."""

    def __init__(self, source: TargetSource, reference: OnlineTeacher):
        self.gives, self.model = source.gives, source.model
        self._source, self._reference = source, reference

    def prefetch(self, batch: MicroBatch) -> None:
        """As the source does."""
        self._source.prefetch(batch)

    def targets(self, batch: MicroBatch) -> Targets:
        """The source's, and the reference's log-probabilities of the labels."""
        targets = self._source.targets(batch)
        if batch.answers_N is None or batch.rows == 0:  # text alone
            return targets
        return replace(targets, reference=self._reference.targets(batch).label)

    def close(self) -> None:
        """As the source does."""
        self._source.close()


def reference_of(student: Any, vocab_size: int) -> OnlineTeacher:
    """The student without its adapters; it must be whole on this rank."""
    return BaseTeacher(StudentsBase(student), Needs(label=True), vocab_size=vocab_size)


def frozen_reference(copy: Any, vocab_size: int) -> OnlineTeacher:
    """A copy of the student that is not trained."""
    SequenceSlice().prepare(copy)
    return OnlineTeacher(ReplicatedTeacher(copy), Needs(label=True), vocab_size=vocab_size)

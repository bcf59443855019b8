"""The teacher's forward of the next micro-batch beside the student's backward of this one, on a CUDA stream of its own.

The GPU then has work while one of the two waits: for weights that ranks gather, for gradients that they add up, for
launches. The values are the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kdscale.config.distill.settings import DistillConfig
from kdscale.models.documents import Documents
from kdscale.runtime.device import tensors_in
from kdscale.teacher.source import MicroBatch, TargetSource
from kdscale.teacher.targets import Targets


def teacher_stream(settings: DistillConfig, device: torch.device) -> torch.cuda.Stream | None:
    """The stream that distill.teacher_overlap asks for; None without it and on a CPU."""
    return torch.cuda.Stream(device) if settings.teacher_overlap and device.type == "cuda" else None


class Lookahead:
    """Targets of the micro-batches of one step, in order; without a `stream` each is asked for when it is needed."""

    def __init__(self, source: TargetSource, stream: torch.cuda.Stream | None):
        self._source, self._stream = source, stream
        self._begun: tuple[MicroBatch, Targets] | None = None

    @property
    def looks(self) -> bool:
        """Whether `begin` does anything."""
        return self._stream is not None

    def begin(self, batch: MicroBatch) -> None:
        """Let the teacher work on `batch`, the next one, behind all that the current stream has been given so far."""
        if self._stream is None:
            return
        self._stream.wait_stream(torch.cuda.current_stream(batch.input_ids_BS.device))
        documents = batch.documents
        if documents is not None:  # what a backend makes of them belongs to the stream that it was made on
            documents = Documents(documents.lengths, documents.bounds_D1)
        own = replace(batch, documents=documents)
        with torch.cuda.stream(self._stream):
            self._begun = batch, self._source.targets(own)
        _used_on(self._stream, own)

    def targets(self, batch: MicroBatch) -> Targets:
        """The targets of `batch`, for work on the current stream."""
        begun, self._begun = self._begun, None
        if self._stream is None or begun is None or begun[0] is not batch:
            return self._source.targets(batch)
        current = torch.cuda.current_stream(batch.input_ids_BS.device)
        current.wait_stream(self._stream)
        _used_on(current, begun[1])
        return begun[1]


def _used_on(stream: torch.cuda.Stream, value: object) -> None:
    """Keep the memory of these tensors from being used again before `stream` is done with them."""
    for tensor in tensors_in(value):
        if tensor.is_cuda:
            tensor.record_stream(stream)

"""Teachers that are made of the student's own weights, which every rank has whole: ZeRO stages 0 to 2.

The exponential moving average of what is trained (mean teacher, arXiv 1703.01780) is made anew after every step. It is
kept in fp32 whatever the student computes in, and starts as the pruned student. The base is the student without its
adapters, the weights that distill.lora leaves as they are: it is never loaded, the adapters are switched off for the
length of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from kdscale.models.head import OutputHead, head_of
from kdscale.models.loading import load_model
from kdscale.models.lora.adapters import without_adapters
from kdscale.models.parameter_map import ParameterRange
from kdscale.teacher.online import OnlineTeacher, open_placed
from kdscale.teacher.placement.placed import ReplicatedTeacher
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.targets import Targets


class StudentAverage:
    """The average, and `model`, the working copy of it that teaches; they are the same tensors in fp32."""

    def __init__(self, model: Any, decay: float):
        self.model, self._decay = model, decay
        self._working = {name: parameter.data for name, parameter in model.named_parameters()}
        self._average = {name: working.float() for name, working in self._working.items()}

    @torch.no_grad()
    def follow(self, student: torch.nn.Module) -> None:
        """Move towards the weights of the student, another model of the same kind: a ← decay·a + (1 − decay)·w."""
        for name, parameter in student.named_parameters():
            self._average[name].lerp_(parameter.detach().float(), 1.0 - self._decay)
        self._refresh()

    def values(self, span: ParameterRange) -> torch.Tensor:
        """A range of a parameter's average, as a checkpoint keeps it."""
        return self._average[span.name].view(-1).narrow(0, span.offset, span.length)

    @torch.no_grad()
    def load(self, fill: Callable[[ParameterRange, torch.Tensor], None]) -> None:
        """Take the average over from a checkpoint."""
        for name, average in self._average.items():
            flat = average.view(-1)
            fill(ParameterRange(name, 0, flat.numel()), flat)
        self._refresh()

    def _refresh(self) -> None:
        for name, working in self._working.items():
            if working is not self._average[name]:
                working.copy_(self._average[name])


def open_ema(request: SourceRequest) -> OpenedSource:
    """The average of the student, whole on this rank's device."""
    model = load_model(
        request.student_dir, dtype=request.dtype, device=request.device,
        trust_remote_code=request.cfg.teacher.trust_remote_code,
    )  # fmt: skip
    opened = open_placed(ReplicatedTeacher(model), request)
    return replace(opened, average=StudentAverage(model, request.cfg.distill.ema.decay))


class StudentsBase:
    """A placed teacher (teacher.placement.placed) around the student's own model."""

    def __init__(self, model: Any):
        self.model, self.vocab = model, head_of(model).vocab

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """The head, which is frozen as all of the base is."""
        yield head_of(self.model)


class BaseTeacher(OnlineTeacher):
    """Asks the student's model without its adapters."""

    def targets(self, batch: MicroBatch) -> Targets:
        """The targets of the batch's rows."""
        with without_adapters(self.model):
            return super().targets(batch)


def open_base(request: SourceRequest) -> OpenedSource:
    """Waits for the student; every rank has it whole."""
    models: list[Any] = []
    return OpenedSource(
        None,
        lambda vocab_size: BaseTeacher(
            StudentsBase(models[0]), request.needs, vocab_size=vocab_size, sequence_slice=request.sequence_slice,
            seed=request.cfg.seed,
        ),
        take_student=models.append,
    )  # fmt: skip

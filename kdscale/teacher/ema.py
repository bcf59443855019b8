"""The teacher that is an exponential moving average of the student's own weights (mean teacher, arXiv 1703.01780).

Every rank has the whole average, which it makes of the weights that all ranks have whole after a step: ZeRO stages 0
to 2. It is kept in fp32 whatever the student computes in, and starts as the pruned student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kdscale.models.loading import load_model
from kdscale.models.parameter_map import ParameterRange
from kdscale.teacher.online import open_placed
from kdscale.teacher.placement.placed import ReplicatedTeacher
from kdscale.teacher.source import OpenedSource, SourceRequest


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

"""Wall time of the phases of a training step."""

from __future__ import annotations

import time
from typing import Any

import torch

PHASES = ("data", "teacher", "student", "loss", "backward", "optimiser")


class Clock:
    """Seconds per phase of a step. On a GPU the marks are events, read after the step's one host sync."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._began = time.perf_counter()
        self.mark("start")

    def elapsed(self) -> float:
        """Wall seconds since the clock was made."""
        return time.perf_counter() - self._began

    def mark(self, phase: str) -> None:
        """Count the time since the previous mark as `phase`."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds per phase, of PHASES and what else was marked; the caller has already waited for the device."""
        totals = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            totals[phase] = totals.get(phase, 0.0)
            totals[phase] += before.elapsed_time(after) / 1000 if self._cuda else after - before
        return totals

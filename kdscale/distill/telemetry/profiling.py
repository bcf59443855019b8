"""`distill.profile`: torch.profiler around a few steps; a trace to look at and a table of the slowest operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kdscale.config.telemetry import ProfileConfig
from kdscale.files import atomic_path, explain_os_errors, write_text

_ROWS = 50


class StepProfiler:
    """Profiles the configured steps of the configured ranks, from drawing the batch to the log."""

    def __init__(self, settings: ProfileConfig, folder: Path, rank: int, device: torch.device):
        wanted = settings.steps is not None and (settings.ranks == "all" or rank == 0)
        self._first, self._last = settings.steps if wanted and settings.steps else (0, 0)
        self._settings, self._folder, self._rank, self._cuda = settings, folder, rank, device.type == "cuda"
        self._running: Any = None

    def begin(self, step: int) -> None:
        """Called before `step` (counted from 1). A run that resumes within the profiled steps profiles the rest."""
        if self._first <= step <= self._last and self._running is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._began = step
            self._running = profile(
                activities=activities,
                record_shapes=self._settings.shapes,
                profile_memory=self._settings.memory,
                with_stack=self._settings.stacks,
            )
            self._running.start()

    def end(self, step: int) -> list[Path]:
        """Called after `step`; returns the files written if it was the last profiled one."""
        if self._running is None or step < self._last:
            return []
        return self.close(step)

    def close(self, step: int) -> list[Path]:
        """Stop and write the profile, also when the run ends before the last profiled step; returns the files."""
        if self._running is None:
            return []
        finished, self._running = self._running, None
        finished.stop()
        stem = f"steps-{self._began}-{step}-rank-{self._rank}"
        trace, table = self._folder / f"{stem}.trace.json", self._folder / f"{stem}.operators.txt"
        with explain_os_errors(trace):
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(trace) as tmp:
                finished.export_chrome_trace(str(tmp))
            averages = finished.key_averages(group_by_input_shape=self._settings.shapes)
            order = "self_device_time_total" if self._cuda else "self_cpu_time_total"
            write_text(table, averages.table(sort_by=order, row_limit=_ROWS) + "\n")
        return [trace, table]

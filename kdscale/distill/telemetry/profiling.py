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
    """Profiles the configured steps, from drawing the batch to the log; does nothing at all in the others."""

    def __init__(self, settings: ProfileConfig, folder: Path, rank: int, device: torch.device):
        wanted = settings.steps is not None and (settings.ranks == "all" or rank == 0)
        self._first, self._last = settings.steps if wanted and settings.steps else (0, 0)
        self._settings, self._folder, self._rank, self._cuda = settings, folder, rank, device.type == "cuda"
        self._running: Any = None

    def begin(self, step: int) -> None:
        """Before anything of `step` (counted from 1) is done. A run that resumes in between profiles what is left."""
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
        """After `step`; the files written, when it was the last one."""
        if self._running is None or step < self._last:
            return []
        return self.close(step)

    def close(self, step: int) -> list[Path]:
        """Stop and write what was seen, also when the run ends before the last profiled step."""
        if self._running is None:
            return []
        done, self._running = self._running, None
        done.stop()
        stem = f"steps-{self._began}-{step}-rank-{self._rank}"
        trace, table = self._folder / f"{stem}.trace.json", self._folder / f"{stem}.operators.txt"
        with explain_os_errors(trace):
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(trace) as tmp:
                done.export_chrome_trace(str(tmp))
            averages = done.key_averages(group_by_input_shape=self._settings.shapes)
            order = "self_device_time_total" if self._cuda else "self_cpu_time_total"
            write_text(table, averages.table(sort_by=order, row_limit=_ROWS) + "\n")
        return [trace, table]

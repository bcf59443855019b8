"""Which steps and ranks are profiled, and what becomes of a profile that is cut short."""

from __future__ import annotations

import json

import torch

from kdscale.config.telemetry import ProfileConfig
from kdscale.distill.telemetry.profiling import StepProfiler

CPU = torch.device("cpu")


def test_only_the_asked_steps_of_the_asked_ranks_are_profiled(tmp_path):
    settings = ProfileConfig(steps=(3, 4))
    profilers = [StepProfiler(settings, tmp_path, rank, CPU) for rank in range(2)]
    written = []
    for step in range(1, 6):
        for profiler in profilers:
            profiler.begin(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        for profiler in profilers:
            written += profiler.end(step)
    assert [path.name for path in written] == [
        "steps-3-4-rank-0.trace.json", "steps-3-4-rank-0.operators.txt",
    ]  # fmt: skip
    events = json.loads(written[0].read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2


def test_a_profile_that_is_cut_short_is_kept(tmp_path):
    profiler = StepProfiler(ProfileConfig(steps=(3, 9), ranks="all"), tmp_path, 1, CPU)
    profiler.begin(3)
    assert profiler.end(3) == []
    assert profiler.close(3)[0].name == "steps-3-3-rank-1.trace.json"

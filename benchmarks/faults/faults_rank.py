"""Runs a rank under benchmarks/faults/faults.py: `faults_rank.py -m MODULE ARGUMENT...`, with faults from outside.

Runs the module as `python -m` would, after replacing what a fault needs. The file that KDSCALE_FAULT_PLAN names says
which fault, and on which rank. kdscale itself knows nothing of this.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

PLAN = Path(os.environ["KDSCALE_FAULT_PLAN"])


def plan() -> dict[str, Any]:
    """The faults that are planned now."""
    try:
        return dict(json.loads(PLAN.read_text()))
    except FileNotFoundError:
        return {}


def slow_disk(seconds: float) -> None:
    """Make every fsync take `seconds` longer."""
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(seconds)
        fsync(handle)

    os.fsync = slow  # type: ignore[assignment]


def skewed_clock(seconds: float) -> None:
    """Set the wall clock `seconds` ahead. libfaketime would reach C code too, but breaks Python's sleeps and waits."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def poisoned_teacher(rank: int) -> None:
    """Put NaN into one weight matrix of this rank's teacher once the plan says so."""
    from kdscale.teacher.online import OnlineTeacher

    targets = OnlineTeacher.targets

    def poisoned(self: Any, *arguments: Any) -> Any:
        if plan().get("nan teacher") == rank:
            _, weight = next(item for item in self.model.named_parameters() if "layers.1.mlp" in item[0])
            weight.data.fill_(float("nan"))
        return targets(self, *arguments)

    OnlineTeacher.targets = poisoned  # type: ignore[method-assign]


def poisoned_loss(rank: int) -> None:
    """Make this rank's loss NaN once the plan says so."""
    from kdscale.distill.step import StudentModule

    forward = StudentModule.forward

    def poisoned(self: Any, *arguments: Any) -> Any:
        losses, figures = forward(self, *arguments)
        factor = float("nan") if plan().get("nan loss") == rank else 1.0
        return tuple(loss * factor for loss in losses), figures

    StudentModule.forward = poisoned  # type: ignore[method-assign]


def no_compiler() -> None:
    """Skip torch.compile, which DeepSpeed calls at import for an optimiser that no run uses: seconds per restart."""
    import torch

    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # type: ignore[assignment]


def main() -> None:
    """Replace what the planned faults need, and run the module."""
    module = sys.argv[2]
    no_compiler()
    sys.executable = os.environ["KDSCALE_FAULT_PYTHON"]  # rank 0 starts its training with it
    planned = plan()
    if "slow" in planned:
        slow_disk(float(planned["slow"]))
    rank = int(os.environ.get("RANK", "0"))
    skewed, seconds = planned.get("skew", (-1, 0))
    if skewed == rank:
        skewed_clock(seconds)
    if module == "kdscale.pipeline.rank_main" or rank > 0:
        poisoned_teacher(rank)
        poisoned_loss(rank)
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""A stage's work spread over several processes on this machine, started by the launcher.

Each started rank runs kdscale.pipeline.rank_main.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from kdscale.errors import DataError, HungRankError, Interrupted, KdscaleError
from kdscale.pipeline.calibration import calibration_batches
from kdscale.pipeline.stage import Context

if TYPE_CHECKING:
    import torch


_ERRORS: dict[int, type[KdscaleError]] = {kind.exit_code: kind for kind in KdscaleError.__subclasses__()}


_ERRORS[HungRankError.exit_code] = HungRankError


def launch(stage: str, context: Context, processes: int) -> None:
    """Run the rank function of `stage` in `processes` ranks and wait. Raises what the first rank that failed raised."""
    from kdscale_launch import JobSpec, LaunchError, RankFailed, run_local

    folders = map(str, (context.run.path, context.teacher, context.source))
    spec = JobSpec(
        command=(sys.executable, "-m", "kdscale.pipeline.rank_main", stage, *folders),
        processes=processes,
        log_dir=context.run.logs,
    )
    try:
        code = run_local(spec)
    except RankFailed as error:
        kind = _ERRORS.get(error.exit_code, KdscaleError)
        raise kind(str(error), hint=f"the ranks' logs are in {context.run.logs}") from error
    except LaunchError as error:
        raise KdscaleError("the ranks could not be started", got=str(error)) from error
    if code > 128:
        raise Interrupted(code - 128)


def join(device: torch.device) -> torch.device:
    """Join the launcher's group; returns this rank's device. Statistics on the CPU and on GPUs are both reduced."""
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def on_ranks(stage: str, run_rank: Callable[[Context], None], context: Context) -> None:
    """Run `run_rank` here, or in as many processes as `importance.processes` says."""
    if context.config.importance.processes == 1:
        run_rank(context)
    else:
        launch(stage, context, context.config.importance.processes)


class RankShare:
    """What is this rank's: its device, its calibration batches, and a folder for what the stage resumes from."""

    def __init__(self, context: Context, stage: str):
        from kdscale.models.hidden_states import Scratch
        from kdscale.runtime import ranks
        from kdscale.runtime.device import resolve_device, set_threads

        config, processes = context.config, context.config.importance.processes
        set_threads(config.runtime.threads, processes)
        self.device = resolve_device(config.runtime.device)
        self.batches = calibration_batches(config, context.run.data)
        self.scratch = Scratch(context.run.work / stage, config.runtime.activation_bytes)
        if processes == 1:
            return
        if len(self.batches) < processes:
            raise DataError(
                "importance.processes is more than there are calibration batches",
                expected=f"at most {len(self.batches)}",
                got=str(processes),
                hint="raise importance.calibration_tokens or lower importance.micro_batch",
            )
        self.device = join(self.device)
        self.batches = self.batches[ranks.rank() :: processes]
        self.scratch = self.scratch.subfolder(f"rank-{ranks.rank()}")

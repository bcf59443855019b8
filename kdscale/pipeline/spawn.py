"""A stage's work spread over several processes on this machine, started by the launcher.

Each started rank runs kdscale.pipeline.rank_main.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdscale.errors import ERRORS_BY_CODE, ConfigError, Interrupted, LostRankError, MachineError
from kdscale.pipeline.calibration import calibration_batches
from kdscale.pipeline.stage import StageContext

if TYPE_CHECKING:
    import torch

    from kdscale.data.batches import Batch
    from kdscale.models.hidden_states import Scratch

RANK_MODULE = "kdscale.pipeline.rank_main"
# Rank 0's torch variables while it runs the single-process stages, which must not take them for their own.
PLACE_VARIABLE = "KDSCALE_PLACE"


def run_on_ranks(
    stage: str,
    run_rank: Callable[[StageContext], None],
    context: StageContext,
    processes: int,
    across_job: bool = False,
) -> None:
    """Run `run_rank` here when `processes` is 1, or in that many ranks, and wait for them.

    `across_job`: a process that was itself started as rank 0 of a larger job (kdscale.jobs.rank) starts rank 0 alone;
    the other ranks are started elsewhere. Raises what the first rank that failed raised, and Interrupted on a signal.
    """
    place = _place_in_job(processes) if across_job else None
    if processes == 1 and place is None:
        run_rank(context)
        return
    from kdscale_launch import STOPPED_EXIT_CODE, JobSpec, LaunchError, RankFailed, run_local

    folders = map(str, (context.run.path, context.teacher, context.model_to_prune))
    spec = JobSpec(
        command=(sys.executable, "-m", RANK_MODULE, stage, *folders),
        processes=1 if place else processes,
        log_dir=context.run.logs,
        place=place,
    )
    try:
        code = run_local(spec)
    except RankFailed as error:
        error_type = ERRORS_BY_CODE.get(error.exit_code, LostRankError)
        raise error_type(str(error), hint=f"the ranks' logs are in {context.run.logs}") from error
    except LaunchError as error:
        raise MachineError("the ranks could not be started", got=str(error)) from error
    finally:
        if across_job:
            os.environ.pop(PLACE_VARIABLE, None)  # the place is taken: no rank waits for rank 0 any more
    if code == STOPPED_EXIT_CODE:
        raise Interrupted(signal.SIGTERM)
    if code > 128:
        lost = code == 128 + signal.SIGTERM
        where = "before every rank had saved; the last checkpoint counts" if lost else ""
        raise Interrupted(code - 128, where, kept=not lost)


def _place_in_job(processes: int) -> Any:
    """Where rank 0 stands among the ranks of the job it was started in; None when this machine is the whole job."""
    from kdscale_launch.rendezvous import parse_rank_place

    if PLACE_VARIABLE not in os.environ:
        return None
    place = parse_rank_place(os.environ[PLACE_VARIABLE])
    if place.world_size != processes:
        raise ConfigError(
            "distill.processes",
            expected=f"{place.world_size}, as many as the launcher started",
            got=str(processes),
            hint="kdscale launch sets it to the number of slots",
        )
    return place


@dataclass(frozen=True)
class RankShare:
    """This rank's device, its calibration batches, and a folder for what the stage resumes from."""

    device: torch.device
    batches: Sequence[Batch]
    scratch: Scratch


def join_calibration(context: StageContext, stage: str) -> RankShare:
    """Join the stage's group, if there are several processes, and take this rank's share of the calibration batches.

    The config has checked that every rank gets one.
    """
    from kdscale.models.hidden_states import Scratch
    from kdscale.runtime.device import resolve_device, set_threads
    from kdscale.runtime.ranks import rank

    config, processes = context.config, context.config.importance.processes
    set_threads(config.runtime.threads, processes)
    device = resolve_device(config.runtime.device)
    batches = calibration_batches(config, context.run.data)
    scratch = Scratch(context.run.work / stage, config.runtime.activation_bytes)
    if processes == 1:
        return RankShare(device, batches, scratch)
    device = _join_group(device)
    return RankShare(device, batches[rank() :: processes], scratch.subfolder(f"rank-{rank()}"))


def _join_group(device: torch.device) -> torch.device:
    """Join the launcher's group; returns this rank's device. Statistics on the CPU and on GPUs are both reduced."""
    import torch

    from kdscale.runtime.ranks import join_launched_group

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    join_launched_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device

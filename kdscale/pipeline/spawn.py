"""A stage's work on the device, in processes of its own: several that share it, or one that takes its memory with it.

Each started rank runs kdscale.pipeline.rank_main.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.root import Config
from kdscale.errors import ERRORS_BY_CODE, ConfigError, Interrupted, LostRankError, MachineError
from kdscale.files import read_own_json, remove_tree
from kdscale.pipeline.calibration import calibration_batches
from kdscale.pipeline.stage import StageContext
from kdscale.runs.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from kdscale.data.batches import Batch
    from kdscale.models.hidden_states import Scratch

RANK_MODULE = "kdscale.pipeline.rank_main"
# Rank 0's torch variables while it runs the single-process stages, which must not take them for their own.
PLACE_VARIABLE = "KDSCALE_PLACE"


def ranks_of(config: Config, field: str) -> int:
    """How many ranks share the stages whose `processes` is this field: its value, or one for each GPU of this host.

    Fewer where the work has fewer parts than there are GPUs; one on a CPU, and one for a field that is empty.
    """
    from kdscale.runtime.device import resolve_device
    from kdscale.runtime.gpu_binding import visible_gpus

    section, _, name = field.rpartition(".")
    settings: Any = attrgetter(section)(config) if field else None
    asked: int | None = getattr(settings, name) if field else 1
    if asked is not None:
        return asked
    return min(visible_gpus(), settings.most_processes) if resolve_device(config.runtime.device).type == "cuda" else 1


def needs_process(config: Config) -> bool:
    """Whether work on the device leaves memory on it, until the process ends, that the next stage would miss."""
    from kdscale.runtime.device import resolve_device

    return resolve_device(config.runtime.device).type != "cpu"


def run_on_ranks(
    stage: str,
    run_rank: Callable[[StageContext], None],
    context: StageContext,
    processes: int,
    across_job: bool = False,
) -> None:
    """Run `run_rank` in `processes` ranks and wait for them; a single one on a CPU runs here.

    `across_job`: a process that was itself started as rank 0 of a larger job (kdscale.jobs.rank) starts rank 0 alone;
    the other ranks are started elsewhere. Raises what the first rank that failed raised, and Interrupted on a signal.
    """
    place = _place_in_job(processes) if across_job else None
    if processes == 1 and place is None and not needs_process(context.config):
        run_rank(replace(context, ranks=1))
        return
    from kdscale_launch import STOPPED_EXIT_CODE, JobSpec, LaunchError, RankFailed, run_local

    _remove_errors(context.run, stage)
    folders = [str(path or "") for path in (context.run.path, context.teacher, context.pruned_from, context.corrected)]
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
        if parts := read_own_json(error_path(context.run, stage, error.rank), is_error):
            raise error_type(**parts) from error
        killed = error.exit_code == -signal.SIGKILL
        cause = "where nobody sent that signal, memory ran out (dmesg says so); " if killed else ""
        raise error_type(str(error), hint=f"{cause}the ranks' logs are in {context.run.logs}") from error
    except LaunchError as error:
        raise MachineError("the ranks could not be started", got=str(error)) from error
    finally:
        _remove_errors(context.run, stage)
        if across_job:
            os.environ.pop(PLACE_VARIABLE, None)  # the place is taken: no rank waits for rank 0 any more
    if code == STOPPED_EXIT_CODE:
        raise Interrupted(signal.SIGTERM)
    if code > 128:
        lost = across_job and code == 128 + signal.SIGTERM  # the other stages save as they go, and lose nothing
        where = "before every rank had saved; the last checkpoint counts" if lost else ""
        raise Interrupted(code - 128, where, kept=not lost)


def error_path(run: RunFolder, stage: str, rank: int | str) -> Path:
    """Where a rank of a stage leaves the error that ends it, for the process that started the ranks."""
    return run.logs / f"{stage}.rank-{rank}.error.json"


def _remove_errors(run: RunFolder, stage: str) -> None:
    for file in run.logs.glob(error_path(run, stage, "*").name):
        file.unlink(missing_ok=True)


def is_error(value: Any) -> bool:
    """Whether a JSON value is what `KdscaleError.parts` gives."""
    return isinstance(value, dict) and {*value} == {"what", "expected", "got", "hint"}


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
    """`join_shares` of the calibration batches, of which the config has checked that every rank gets one."""
    return join_shares(context, stage, calibration_batches(context.config, context.run.data))


def join_shares(context: StageContext, stage: str, batches: Sequence[Batch]) -> RankShare:
    """Join the stage's group, if there are several processes, and take this rank's share of `batches`.

    What a killed try of another number of ranks left is removed: its shares were others.
    """
    from kdscale.models.hidden_states import Scratch

    device, rank, ranks = join_ranks(context), own_rank(context), context.ranks
    mine = context.run.work / stage / f"{ranks}-ranks"
    if rank == 0:
        for other in (context.run.work / stage).glob("*-ranks"):
            if other != mine:
                remove_tree(other)
    scratch = Scratch(mine / f"rank-{rank}", context.config.runtime.activation_bytes)
    return RankShare(device, batches[rank::ranks], scratch)


def own_rank(context: StageContext) -> int:
    """This process's number among the ranks of the stage; a stray RANK in the environment of one process is none."""
    return int(os.environ["RANK"]) if context.ranks > 1 else 0


def join_ranks(context: StageContext) -> torch.device:
    """Set this process's threads and device, and join the others of the stage if there are any; returns the device.

    Statistics on the CPU and on GPUs are both reduced.
    """
    from kdscale.runtime.device import set_threads
    from kdscale.runtime.gpu_binding import rank_device
    from kdscale.runtime.ranks import join_launched_group

    set_threads(context.config.runtime.threads, context.ranks)
    device = rank_device(context.config.runtime.device)
    if context.ranks > 1:
        join_launched_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", device)
    return device

"""A stage's work spread over several processes on this machine, started by the launcher.

`python -m kdscale.runs.ranks STAGE RUN_DIR TEACHER_DIR PRUNED_FROM_DIR` is what each started rank runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config import load_config
from kdscale.errors import HungRankError, Interrupted, KdscaleError
from kdscale.progress import Reporter
from kdscale.runs.folder import RunFolder
from kdscale.runs.stage import Context

if TYPE_CHECKING:
    import torch

_ERRORS: dict[int, type[KdscaleError]] = {kind.exit_code: kind for kind in KdscaleError.__subclasses__()}
_ERRORS[HungRankError.exit_code] = HungRankError


def launch(stage: str, context: Context, processes: int) -> None:
    """Run `work.RANK_WORK[stage]` in `processes` ranks and wait. Raises what the first rank that failed raised."""
    from kdscale_launch import JobSpec, LaunchError, RankFailed, run_local

    folders = map(str, (context.run.path, context.teacher, context.source))
    spec = JobSpec(
        command=(sys.executable, "-m", "kdscale.runs.ranks", stage, *folders),
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


def main() -> int:
    from kdscale.runs.work import RANK_WORK
    from kdscale_launch.watchdog import watching

    stage, (folder, teacher, source) = sys.argv[1], map(Path, sys.argv[2:5])
    run = RunFolder(folder)
    config, reporter = load_config(run.config), Reporter(quiet=os.environ["RANK"] != "0")
    try:
        with watching(config.runtime.watchdog_seconds, int(os.environ["RANK"])):
            RANK_WORK[stage](Context(config, run, teacher, reporter, source))
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # a process that has used gloo aborts now and then on its way out

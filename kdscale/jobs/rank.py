"""`python -m kdscale.jobs.rank CONFIG [--until=STAGE] [--accept-changes] [KEY=VALUE ...]`: one rank of a job.

With a STAGE before the distillation there is one rank, which runs the stages up to it.

Every rank runs the same command under RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Rank 0 is `kdscale
run`: it runs the single-process stages and starts rank 0 of the distill stage. The other ranks wait until rank 0
listens on MASTER_PORT, distil with it, and leave. Exit code 75 after SIGTERM: everything is saved, start the job again.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError, Interrupted, KdscaleError
from kdscale.pipeline.checks import check_teacher
from kdscale.pipeline.rank_main import run_as_rank
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.spawn import PLACE_VARIABLE
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.registry import STAGES, job_stage, job_targets
from kdscale.runs.folder import RunFolder
from kdscale.runs.lineage import corrected_teacher, last_step_student, merged_teacher
from kdscale.runtime.exits import exit_code_of, leave
from kdscale.runtime.gpu_binding import claim_gpu
from kdscale.runtime.progress import Reporter
from kdscale.runtime.signals import raise_interrupted

ACCEPT, UNTIL = "--accept-changes", "--until="


def main(arguments: Sequence[str]) -> int:
    """Run this process's rank to the end; returns the exit code."""
    from kdscale_launch import LaunchError

    stop = raise_interrupted()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    signal.signal(signal.SIGUSR1, _show_stacks)
    try:
        config, until, accept_changes = _parse(arguments)
        return _run_rank(config, until, accept_changes)
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return ConfigError.exit_code
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return exit_code_of(stop)


def _parse(arguments: Sequence[str]) -> tuple[Config, str, bool]:
    """The config, the last stage, and whether changes are accepted. Raises ConfigError for anything unknown."""
    options = [item for item in arguments if item.startswith("--")]
    config, *overrides = [item for item in arguments if not item.startswith("--")] or [""]
    until = next((item.removeprefix(UNTIL) for item in options if item.startswith(UNTIL)), list(STAGES)[-1])
    if not config or any(item != ACCEPT and not item.startswith(UNTIL) for item in options):
        usage = "CONFIG [--until=STAGE] [--accept-changes] [KEY=VALUE ...]"
        given = " ".join(arguments) or "nothing"
        raise ConfigError("python -m kdscale.jobs.rank", expected=usage, got=given)
    if until not in STAGES:
        raise ConfigError("--until", expected=f"one of {', '.join(STAGES)}", got=until)
    return load_config(Path(config), overrides), until, ACCEPT in options


def _run_rank(config: Config, until: str, accept_changes: bool) -> int:
    from kdscale_launch import rendezvous

    rendezvous.check_rank_variables(os.environ)
    rendezvous.set_interfaces(os.environ)
    with closing(claim_gpu(config.runtime.device, os.environ)):
        return _take_part(config, until, accept_changes)


def _take_part(config: Config, until: str, accept_changes: bool) -> int:
    """Run all stages as rank 0, or the stage that all ranks share as another one."""
    from kdscale_launch import rendezvous

    if os.environ.get("RANK") == "0":
        place = rendezvous.take_rank_place(os.environ)
        if until in job_targets():
            os.environ[PLACE_VARIABLE] = place
        run_until(config, until, Reporter(), accept_changes=accept_changes)
        if PLACE_VARIABLE in os.environ:  # the distill stage had nothing to do
            rendezvous.release_waiting_ranks(rendezvous.parse_rank_place(os.environ[PLACE_VARIABLE]))
        return 0
    if not rendezvous.wait_for_rank_0(os.environ):
        return 0
    run = RunFolder(Path(config.run_dir))
    context = StageContext(
        config,
        run,
        check_teacher(config),
        Reporter(),
        last_step_student(config),
        corrected_teacher(config, run),
        merged=merged_teacher(config, run),
    )
    return run_as_rank(job_stage(), context)


def _show_stacks(number: int, _frame: object) -> None:
    """The launcher asks every rank when one hangs; the distillation's watchdog and launcher have their own handlers."""
    faulthandler.dump_traceback(all_threads=True)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

"""`python -m kdscale.jobs.rank CONFIG [--until=STAGE] [--accept-changes] [KEY=VALUE ...]`: one rank of a job.

Every rank runs the same command under RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Rank 0 is `kdscale
run`: it takes the single-process stages and starts rank 0 of the distill stage. The others wait until rank 0 listens on
MASTER_PORT, distil with it, and are done. Exit code 75 after SIGTERM: everything is saved, start the job again.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kdscale.config.load import load_config
from kdscale.errors import ConfigError, Interrupted, KdscaleError
from kdscale.pipeline.checks import check_teacher
from kdscale.pipeline.rank_main import run_as_rank
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.spawn import PLACE_VARIABLE
from kdscale.pipeline.stage import StageContext
from kdscale.runs.folder import RunFolder
from kdscale.runtime.exits import exit_code_of, leave
from kdscale.runtime.progress import Reporter

ACCEPT, UNTIL = "--accept-changes", "--until="


def main(arguments: Sequence[str]) -> int:
    from kdscale_launch import LaunchError
    from kdscale_launch.rendezvous import (
        parse_rank_place,
        release_waiting_ranks,
        set_gloo_interface,
        take_rank_place,
        wait_for_rank_0,
    )

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    signal.signal(signal.SIGUSR1, _show_stacks)
    try:
        last = next((item.removeprefix(UNTIL) for item in arguments if item.startswith(UNTIL)), "report")
        config = load_config(Path(arguments[0]), [item for item in arguments[1:] if not item.startswith("--")])
        set_gloo_interface(os.environ)
        if os.environ.get("RANK") == "0":
            os.environ[PLACE_VARIABLE] = take_rank_place(os.environ)
            run_until(config, last, Reporter(), accept_changes=ACCEPT in arguments)
            if PLACE_VARIABLE in os.environ:
                release_waiting_ranks(parse_rank_place(os.environ[PLACE_VARIABLE]))
            return 0
        if not wait_for_rank_0(os.environ):
            return 0
        run = RunFolder(Path(config.run_dir))
        return run_as_rank("distill", StageContext(config, run, check_teacher(config), Reporter()))
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return ConfigError.exit_code
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return exit_code_of(stop)


def _stop(number: int, _frame: object) -> NoReturn:
    raise Interrupted(number)


def _show_stacks(number: int, _frame: object) -> None:
    """The launcher asks every rank when one hangs; the distillation's watchdog and launcher answer for themselves."""
    faulthandler.dump_traceback(all_threads=True)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

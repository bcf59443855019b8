"""One rank of a stage that several processes share; started by kdscale.pipeline.spawn.

`python -m kdscale.pipeline.rank_main STAGE RUN_DIR TEACHER_DIR PRUNED_FROM_DIR CORRECTED_DIR`; the last two
may be empty
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from kdscale.config.load import load_config
from kdscale.errors import Interrupted, KdscaleError
from kdscale.files import explain_os_errors, write_json
from kdscale.pipeline.runner import run_inner
from kdscale.pipeline.spawn import error_path
from kdscale.pipeline.stage import StageContext, explain_lack_of_memory
from kdscale.pipeline.stages.registry import STAGES
from kdscale.runs.folder import RunFolder
from kdscale.runtime.exits import exit_code_of, leave
from kdscale.runtime.progress import Reporter
from kdscale.runtime.signals import signals_as_exceptions


def main(arguments: Sequence[str]) -> int:
    """Run one rank of a stage; returns its exit code."""
    stage, folder, teacher, *others = arguments
    pruned_from, corrected = (Path(other) if other else None for other in others)
    run, first = RunFolder(Path(folder)), os.environ["RANK"] == "0"
    context = StageContext(
        load_config(run.config), run, Path(teacher), Reporter(quiet=not first), pruned_from, corrected,
        run_inner=run_inner, ranks=int(os.environ["WORLD_SIZE"]),
    )  # fmt: skip

    def pass_on(error: KdscaleError) -> None:
        """Let the process that waits raise it; it is printed in a rank's log, and where the disk has no room."""
        try:
            write_json(error_path(run, stage, os.environ["RANK"]), error.parts)
        except OSError:
            print_error(error)
        else:
            if not first:
                print_error(error)

    # One of several ranks must not leave by itself while the others wait for it: they all die of the signal.
    with signals_as_exceptions() if context.ranks == 1 else nullcontext():
        return run_as_rank(stage, context, pass_on)


def print_error(error: KdscaleError) -> None:
    """Print what a user can act on."""
    print(f"error: {error}", file=sys.stderr)


def run_as_rank(stage_name: str, context: StageContext, tell: Callable[[KdscaleError], None] = print_error) -> int:
    """What this process does as a rank of the stage; `tell` is given a user's error, which is an exit code too."""
    from kdscale_launch.watchdog import watching

    stage = STAGES[stage_name]
    assert stage.run_rank is not None
    seconds = 0.0 if stage.watches_itself else context.config.runtime.watchdog_seconds
    # c10d's own deprecations, twice a step in some versions, would bury what a rank's log is for
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        with (
            explain_os_errors(context.run.path),
            explain_lack_of_memory(stage),
            watching(seconds, int(os.environ["RANK"])) if seconds else nullcontext(),
        ):
            stage.run_rank(context)
    except KdscaleError as error:
        tell(error)
        return error.exit_code
    except Interrupted as stop:
        context.reporter.say(str(stop))  # where: the process that waits knows the signal alone
        return exit_code_of(stop)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

"""One rank of a stage that several processes share; started by kdscale.pipeline.spawn.

`python -m kdscale.pipeline.rank_main STAGE RUN_DIR TEACHER_DIR PRUNED_FROM_DIR`
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from kdscale.config.load import load_config
from kdscale.errors import Interrupted, KdscaleError
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.registry import STAGES
from kdscale.runs.folder import RunFolder
from kdscale.runtime.exits import exit_code_of, leave
from kdscale.runtime.progress import Reporter


def main(arguments: Sequence[str]) -> int:
    """Run one rank of a stage; returns its exit code."""
    stage, (folder, teacher, pruned_from) = arguments[0], map(Path, arguments[1:4])
    run = RunFolder(folder)
    reporter = Reporter(quiet=os.environ["RANK"] != "0")
    return run_as_rank(stage, StageContext(load_config(run.config), run, teacher, reporter, pruned_from))


def run_as_rank(stage_name: str, context: StageContext) -> int:
    """What this process does as a rank of the stage; a user's error is one message and an exit code."""
    from kdscale_launch.watchdog import watching

    stage = STAGES[stage_name]
    assert stage.run_rank is not None
    seconds = 0.0 if stage.watches_itself else context.config.runtime.watchdog_seconds
    # c10d's own deprecations, twice a step in some versions, would bury what a rank's log is for
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        with watching(seconds, int(os.environ["RANK"])) if seconds else nullcontext():
            stage.run_rank(context)
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        return exit_code_of(stop)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

"""One rank of a stage that several processes share; started by kdscale.pipeline.spawn.

`python -m kdscale.pipeline.rank_main STAGE RUN_DIR TEACHER_DIR PRUNED_FROM_DIR`
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from kdscale.config.load import load_config
from kdscale.errors import KdscaleError
from kdscale.pipeline.stage import Context
from kdscale.pipeline.stages.importance import importance_rank
from kdscale.pipeline.stages.prune import prune_rank
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter


def main() -> int:
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


# What each rank of a stage does, in this process or in several (kdscale.pipeline.spawn).
RANK_WORK: Mapping[str, Callable[[Context], None]] = {"importance": importance_rank, "prune": prune_rank}


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # a process that has used gloo aborts now and then on its way out

"""The distill stage: one rank in this process, or several started by the launcher.

`python -m kdscale.pipeline.stages.distill RUN_DIR TEACHER_DIR` is what each started rank runs. When this process was
itself started as rank 0 of a larger job (kdscale.jobs.rank), it starts rank 0 alone; the others are started elsewhere.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError, HungRankError, Interrupted, KdscaleError, LostRankError, TrainingError
from kdscale.pipeline.stage import Context, Facts
from kdscale.runs.folder import RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.exits import FINAL_CODES, exit_code_of, leave
from kdscale.runtime.progress import Reporter

# Rank 0's torch variables while it runs the single-process stages, which must not take them for their own.
PLACE_VARIABLE = "KDSCALE_PLACE"


def train(context: Context) -> Mapping[str, Any]:
    """Distil to the end or raise; returns the last validation's figures."""
    if context.config.distill.processes == 1 and PLACE_VARIABLE not in os.environ:
        _run_rank(context.config, context.run, context.distilled_from, context.reporter)
    else:
        _launch(context)
    rows = [row for row in read_metrics(context.run.logs / "metrics.jsonl") if row["kind"] == "validation"]
    return {"held-out perplexity": f"{rows[0]['perplexity']:.2f} → {rows[-1]['perplexity']:.2f}"} if rows else {}


def _run_rank(config: Config, run: RunFolder, teacher: Path, reporter: Reporter) -> None:
    from kdscale.distill import engine
    from kdscale.runtime.ranks import rank
    from kdscale.runtime.timeouts import watchdog_seconds
    from kdscale_launch.watchdog import watching

    with watching(watchdog_seconds(config), rank()):
        engine.run(
            config, teacher_dir=teacher, student_dir=run.pruned, data_dir=run.data, run_dir=run.path, reporter=reporter
        )


def _launch(context: Context) -> None:
    from kdscale_launch import HUNG_EXIT_CODE, JobSpec, LaunchError, RankFailed, run_local

    place = _place(context.config)
    spec = JobSpec(
        command=(
            sys.executable,
            "-m",
            "kdscale.pipeline.stages.distill",
            str(context.run.path),
            str(context.distilled_from),
        ),
        processes=1 if place else context.config.distill.processes,
        log_dir=context.run.logs,
        place=place,
    )
    try:
        code = run_local(spec)
    except RankFailed as error:
        hint = f"the ranks' logs are in {context.run.logs}"
        if error.exit_code in FINAL_CODES:
            raise TrainingError(str(error), hint=hint) from error
        lost = HungRankError if error.exit_code == HUNG_EXIT_CODE else LostRankError
        raise lost(str(error), hint=hint) from error
    except LaunchError as error:
        raise TrainingError("the ranks could not be started", got=str(error)) from error
    finally:
        os.environ.pop(PLACE_VARIABLE, None)  # the place was taken: no rank waits for rank 0 any more
    if code > 128:
        raise Interrupted(code - 128)


def _place(config: Config) -> Any:
    """Where rank 0 stands among the ranks of the job it was started in; None when the job is this machine's alone."""
    from kdscale_launch.rendezvous import parse_rank_place

    if PLACE_VARIABLE not in os.environ:
        return None
    place = parse_rank_place(os.environ[PLACE_VARIABLE])
    if place.world_size != config.distill.processes:
        raise ConfigError(
            "distill.processes",
            expected=f"{place.world_size}, as many as the launcher started",
            got=str(config.distill.processes),
            hint="kdscale launch sets it to the number of slots",
        )
    return place


def run_as_rank(run: RunFolder, config: Config, teacher: Path) -> int:
    """One rank: errors of the user's are one message and an exit code, as on the command line."""
    # c10d's own deprecations, twice a step in some versions, would bury what a rank's log is for
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        _run_rank(config, run, teacher, Reporter())
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        return exit_code_of(stop)
    # Only after success: a rank that failed alone would wait here for others that wait for it.
    from kdscale.distill import engine

    engine.shutdown()
    return 0


def main() -> int:
    run = RunFolder(Path(sys.argv[1]))
    return run_as_rank(run, load_config(run.config), Path(sys.argv[2]))


def what_distillation_depends_on(context: Context) -> Facts:
    return {"distill": context.config.distill.decisive()}


def distill(context: Context) -> Facts:

    return train(context)


if __name__ == "__main__":
    leave(main())

"""The distill stage: one rank in this process, or several started by the launcher.

`python -m kdscale.runs.training RUN_DIR TEACHER_DIR` is what each started rank runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdscale.config import Config, load_config
from kdscale.errors import Interrupted, KdscaleError, TrainingError
from kdscale.metrics import read_metrics
from kdscale.progress import Reporter
from kdscale.runs.folder import RunFolder
from kdscale.runs.stage import Context


def train(context: Context) -> Mapping[str, Any]:
    """Distil to the end or raise; returns the last validation's figures."""
    if context.config.distill.processes == 1:
        _run_rank(context.config, context.run, context.distilled_from, context.reporter)
    else:
        _launch(context)
    rows = [row for row in read_metrics(context.run.logs / "metrics.jsonl") if row["kind"] == "validation"]
    return {"held-out perplexity": f"{rows[0]['perplexity']:.2f} → {rows[-1]['perplexity']:.2f}"} if rows else {}


def _run_rank(config: Config, run: RunFolder, teacher: Path, reporter: Reporter) -> None:
    from kdscale.distill import engine

    engine.run(
        config, teacher_dir=teacher, student_dir=run.pruned, data_dir=run.data, run_dir=run.path, reporter=reporter
    )


def _launch(context: Context) -> None:
    from kdscale_launch import JobSpec, LaunchError, RankFailed, run_local

    spec = JobSpec(
        command=(sys.executable, "-m", "kdscale.runs.training", str(context.run.path), str(context.distilled_from)),
        processes=context.config.distill.processes,
        log_dir=context.run.logs,
    )
    try:
        code = run_local(spec)
    except RankFailed as error:
        raise TrainingError(str(error), hint=f"the ranks' logs are in {context.run.logs}") from error
    except LaunchError as error:
        raise TrainingError("the ranks could not be started", got=str(error)) from error
    if code > 128:
        raise Interrupted(code - 128)


def main() -> int:
    """One rank: errors of the user's are one message and an exit code, as on the command line."""
    run = RunFolder(Path(sys.argv[1]))
    try:
        _run_rank(load_config(run.config), run, Path(sys.argv[2]), Reporter())
    except KdscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        return stop.exit_code
    # Only after success: a rank that failed alone would wait here for others that wait for it.
    from kdscale.distill import engine

    engine.shutdown()
    return 0


if __name__ == "__main__":
    # Not sys.exit: with DeepSpeed and gloo loaded, one ordinary exit in ten aborts after all is done.
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)

"""Progressive pruning: the steps before the config's own, each a run folder of its own inside the run's.

A step prunes the student of the one before (the first one the teacher) and distils into what is left, all on the same
text. Its folder has the stages, manifests and resuming of any run; evaluation and report are of the last student alone.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path

from kdscale.config import Config
from kdscale.files import remove_leftovers
from kdscale.runs import pipeline
from kdscale.runs.folder import RunFolder
from kdscale.runs.stage import Context


def run_steps(context: Context) -> tuple[bool, Context]:
    """Bring all steps up to date; whether there was anything to do, and the context in which the run goes on."""
    did = False
    for index, step in enumerate(context.config.steps):
        context.reporter.say(f"⇒ step {index + 1} of {len(context.config.steps) + 1}: {step.name}")
        inner = sub_run(context, context.config.step(index), context.source)
        did |= bring_up(inner, "distill")
        context = replace(context, pruned_from=inner.run.student)
    context.reporter.say(f"⇒ step {len(context.config.steps) + 1} of {len(context.config.steps) + 1}")
    return did, context


def sub_run(context: Context, config: Config, source: Path) -> Context:
    """The context of a run inside this one, which prunes `source`; nothing is written yet."""
    return Context(config, RunFolder(Path(config.run_dir)), context.teacher, context.reporter, source)


def bring_up(inner: Context, last: str, data: Path | None = None) -> bool:
    """Run an inner run's stages after `data` up to and including `last`; the text is that of the run around it."""
    run, did = inner.run, False
    with run.lock():
        for change in run.adopt_config(inner.config, accept_changes=True):
            inner.reporter.say(f"  config changed: {change}")
        for folder in (run.logs, run.checkpoints, run.stages):
            if folder.exists():
                remove_leftovers(folder)
        _share_data(run, data or run.path.parent.parent / "data")
        pipeline.check_disk(inner)
        names = pipeline.STAGE_NAMES
        for stage in pipeline.STAGES[1 : names.index(last) + 1]:
            did |= pipeline.guarded(stage, inner)
    gc.collect()  # the engine of a finished distillation is in reference cycles, and the next step needs its memory
    return did


def _share_data(run: RunFolder, data: Path) -> None:
    """The tokenised text as a link: made once, and hundreds of gigabytes for a large run."""
    if not run.data.is_symlink():
        run.data.symlink_to(os.path.relpath(data.resolve(), run.path.resolve()), target_is_directory=True)

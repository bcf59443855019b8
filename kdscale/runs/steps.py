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
        did |= bring_up(inner, ("importance", "plan", "prune", "distill"), {"data": context.run.data})
        context = replace(context, pruned_from=inner.run.student)
    context.reporter.say(f"⇒ step {len(context.config.steps) + 1} of {len(context.config.steps) + 1}")
    return did, context


def sub_run(context: Context, config: Config, source: Path) -> Context:
    """The context of a run inside this one, which prunes `source`; nothing is written yet."""
    return Context(config, RunFolder(Path(config.run_dir)), context.teacher, context.reporter, source)


def bring_up(inner: Context, stages: tuple[str, ...], shared: dict[str, Path]) -> bool:
    """Run these stages of an inner run, with outputs of earlier stages `shared` from the run around it.

    They are links: tokenised text is made once, and can be hundreds of gigabytes.
    """
    run, did = inner.run, False
    with run.lock():
        for change in run.adopt_config(inner.config, accept_changes=True):
            inner.reporter.say(f"  config changed: {change}")
        for folder in (run.logs, run.checkpoints, run.stages):
            if folder.exists():
                remove_leftovers(folder)
        for name, target in shared.items():
            link = run.path / name
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(target.resolve(), run.path.resolve()), target_is_directory=True)
        pipeline.check_disk(inner)
        for stage in pipeline.STAGES:
            if stage.name in stages:
                did |= pipeline.guarded(stage, inner)
    gc.collect()  # the engine of a finished distillation is in reference cycles, and the next step needs its memory
    return did

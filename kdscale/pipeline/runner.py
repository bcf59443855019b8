"""The stages of a run, in order, and the one function that brings a run up to a given stage."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from kdscale.config.root import Config
from kdscale.distill.parallel.checks import (
    check_sequence_dims,
    check_sequence_parallel,
    check_tensor_dims,
    check_tensor_parallel,
)
from kdscale.distill.telemetry.trackers import check_trackers
from kdscale.errors import Interrupted, KdscaleError, RunFolderError
from kdscale.files import explain_os_errors, remove_leftovers
from kdscale.pipeline.checks import _refuse_hopeless_paths, check_disk, check_teacher, plan_shapes
from kdscale.pipeline.stage import Context, Stage, run_stage
from kdscale.pipeline.stages.registry import STAGE_NAMES, STAGES
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from kdscale.runtime.signals import _signals_as_exceptions


def report_so_far(config: Config, reporter: Reporter) -> bool:
    """Write the report of whatever the run folder holds; returns whether anything had to be done.

    Runs no other stage: what is missing is said in the report. Raises RunFolderError when there is no such run.
    """
    run = RunFolder(Path(config.run_dir))
    if not run.config.exists():
        raise RunFolderError(
            f"{run.path} is not a run folder", expected="a run to report on", hint="kdscale run CONFIG makes one"
        )
    with run.lock(), _signals_as_exceptions():
        context = Context(config, run, run.path, reporter)  # the report reads no teacher
        return guarded(STAGES[-1], context)


def run_until(config: Config, last: str, reporter: Reporter, accept_changes: bool = False) -> bool:
    """Bring every stage up to and including `last` up to date; returns whether anything had to be done.

    Safe to kill at any instant and to call again. Raises KdscaleError subclasses, and Interrupted on a signal.
    """
    run = RunFolder(Path(config.run_dir))
    _refuse_hopeless_paths(run.path)
    check_trackers(config.tracking)
    teacher = check_teacher(config)
    plans = plan_shapes(config, teacher)  # an impossible budget is found before anything is made
    distill = config.distill
    check_tensor_parallel(distill.tensor_parallel, {"teacher": teacher})
    check_sequence_parallel(distill.sequence_parallel, distill.seq_len, {"teacher": teacher})
    for plan in plans:
        check_tensor_dims(distill.tensor_parallel, "student", plan.student.dims())
        check_sequence_dims(distill.sequence_parallel, "student", plan.student.dims())
    with run.lock(), _signals_as_exceptions():
        changes = run.adopt_config(config, accept_changes)
        for change in changes:
            reporter.say(f"  config changed: {change}")
        for folder in (run.logs, run.checkpoints, run.stages):
            if folder.exists():
                remove_leftovers(folder)
        context = Context(config, run, teacher, reporter, run_inner=run_inner)
        check_disk(context)
        did = False
        for stage in STAGES[: STAGE_NAMES.index(last) + 1]:
            if stage.name == STAGE_NAMES[1] and config.steps:
                changed, context = run_steps(context)
                did |= changed
            did |= guarded(stage, context)
        return did


def guarded(stage: Stage, context: Context) -> bool:
    """Run one stage; whatever ends it early is on record in status.json and events.jsonl before it goes on up.

    A stage that makes no progress for `runtime.watchdog_seconds` ends the process with exit code 9 (see `watching`).
    """
    from kdscale_launch.watchdog import watching

    # the distillation's ranks have their own: this process may be one of them
    seconds = 0.0 if stage.name == "distill" else context.config.runtime.watchdog_seconds
    try:
        with explain_os_errors(context.run.path), watching(seconds, 0) if seconds else nullcontext():
            return run_stage(stage, context)
    except Interrupted as stop:
        context.run.set_status(stage.name, "interrupted", reason=str(stop))
        raise
    except KdscaleError as error:
        context.run.set_status(stage.name, "failed", reason=str(error))
        raise


def run_steps(context: Context) -> tuple[bool, Context]:
    """Bring all steps up to date; whether there was anything to do, and the context in which the run goes on."""
    did = False
    for index, step in enumerate(context.config.steps):
        context.reporter.say(f"⇒ step {index + 1} of {len(context.config.steps) + 1}: {step.name}")
        config = context.config.step(index)
        did |= run_inner(context, config, ("importance", "plan", "prune", "distill"), {"data": context.run.data})
        context = replace(context, pruned_from=RunFolder(Path(config.run_dir)).student)
    context.reporter.say(f"⇒ step {len(context.config.steps) + 1} of {len(context.config.steps) + 1}")
    return did, context


def run_inner(outer: Context, config: Config, stages: tuple[str, ...], shared: Mapping[str, Path]) -> bool:
    """Run these stages of a run inside `outer`, which prunes the same model; `shared`: outputs of the outer run.

    Shared outputs are links: tokenised text is made once, and can be hundreds of gigabytes.
    """
    run, did = RunFolder(Path(config.run_dir)), False
    inner = replace(outer, config=config, run=run, pruned_from=outer.source)
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
        check_disk(inner)
        for stage in STAGES:
            if stage.name in stages:
                did |= guarded(stage, inner)
    gc.collect()  # the engine of a finished distillation is in reference cycles, and the next step needs its memory
    return did

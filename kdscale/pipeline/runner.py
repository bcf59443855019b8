"""Brings a run up to a given stage, and runs inside it: the steps on the way to the student, and probes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from kdscale.config.root import Config
from kdscale.errors import Interrupted, KdscaleError, RunFolderError
from kdscale.files import explain_os_errors, remove_leftovers
from kdscale.pipeline.checks import check_before_work, check_disk, plan_shapes, student_parameters
from kdscale.pipeline.stage import (
    Stage,
    StageContext,
    explain_lack_of_memory,
    manifest_path,
    refuse_to_lose_progress,
    run_stage,
)
from kdscale.pipeline.stages.registry import STAGES, stages_of, stages_of_steps, stages_until
from kdscale.runs.folder import RunFolder
from kdscale.runs.lineage import corrected_teacher, merged_teacher
from kdscale.runtime.progress import Reporter
from kdscale.runtime.signals import signals_as_exceptions


def report_so_far(config: Config, reporter: Reporter) -> bool:
    """Write the report of whatever the run folder holds; returns whether anything had to be done.

    Runs no other stage: the report says what is missing. Raises RunFolderError when there is no such run.
    """
    run = RunFolder(Path(config.run_dir))
    if not run.config.exists():
        raise RunFolderError(
            f"{run.path} is not a run folder", expected="a run to report on", hint="kdscale run CONFIG makes one"
        )
    with run.lock(), signals_as_exceptions():
        context = StageContext(config, run, run.path, reporter)  # the report reads no teacher
        return _guarded(STAGES["report"], context)


def run_until(config: Config, last: str, reporter: Reporter, accept_changes: bool = False) -> bool:
    """Bring every stage up to and including `last` up to date; returns whether anything had to be done.

    Safe to kill at any instant and to call again. Raises KdscaleError subclasses, and Interrupted on a signal; a
    GateError when everything is written.
    """
    run = RunFolder(Path(config.run_dir))
    stages = stages_until(last, config)
    of_steps = stages_of_steps(config) if any(stage.in_steps for stage in stages) else []
    teacher, plans = check_before_work(config, run, stages, reporter, of_steps)
    with run.lock(), signals_as_exceptions():
        context = StageContext(
            config, run, teacher, reporter, corrected=corrected_teacher(config, run), run_inner=run_inner,
            accept_changes=accept_changes, merged=merged_teacher(config, run),
        )  # fmt: skip
        _adopt_config(context, accept_changes)
        if not accept_changes and not config.steps:
            refuse_to_lose_progress(stages, context)
        check_disk(context, stages, student_parameters(context, plans))
        changed = False
        for stage in stages:
            if stage.in_steps and config.steps and context.pruned_from is None:
                steps_changed, context = _run_steps(context)
                changed |= steps_changed
            changed |= _guarded(stage, context)
            if stage.check_after is not None and not all(manifest_path(later, run).exists() for later in stages):
                stage.check_after(config, run)
        for stage in stages:
            if stage.gate is not None:
                stage.gate(config, run)
        return changed


def _adopt_config(context: StageContext, accept_changes: bool) -> None:
    """Store the config in the run folder, report what changed, and clear what killed processes left half-written."""
    run = context.run
    for change in run.adopt_config(context.config, accept_changes):
        context.reporter.say(f"  config changed: {change}")
    for folder in (run.logs, run.checkpoints, run.stages):
        if folder.exists():
            remove_leftovers(folder)


def _guarded(stage: Stage, context: StageContext) -> bool:
    """Run one stage; whatever ends it early is recorded in status.json and events.jsonl before it is raised further.

    A stage that makes no progress for `runtime.watchdog_seconds` ends the process with exit code 9 (see `watching`).
    """
    from kdscale_launch.watchdog import watching

    seconds = 0.0 if stage.watches_itself else context.config.runtime.watchdog_seconds
    try:
        with (
            explain_os_errors(context.run.path),
            explain_lack_of_memory(stage),
            watching(seconds, 0) if seconds else nullcontext(),
        ):
            return run_stage(stage, context)
    except Interrupted as stop:
        context.run.set_status(stage.name, "interrupted", reason=str(stop))
        raise
    except KdscaleError as error:
        context.run.set_status(stage.name, "failed", reason=str(error))
        raise


def _run_steps(context: StageContext) -> tuple[bool, StageContext]:
    """Bring all steps up to date; whether there was anything to do, and the context in which the run goes on."""
    changed, count = False, len(context.config.steps) + 1
    stages = tuple(stage.name for stage in stages_of_steps(context.config))
    for index, step in enumerate(context.config.steps):
        context.reporter.say(f"⇒ step {index + 1} of {count}: {step.name}")
        config = context.config.step(index)
        changed |= run_inner(context, config, stages, context.shared_text())
        context = replace(context, pruned_from=RunFolder(Path(config.run_dir)).student)
    context.reporter.say(f"⇒ step {count} of {count}")
    return changed, context


def run_inner(outer: StageContext, config: Config, stages: tuple[str, ...], shared: Mapping[str, Path]) -> bool:
    """Run these stages of a run inside `outer`, which prunes the same model; `shared`: outputs of the outer run.

    Shared outputs are links: tokenised text is made once, and can be hundreds of gigabytes. Where the inner run makes
    no plan, its student has the size of `outer`'s model.
    """
    run, changed = RunFolder(Path(config.run_dir)), False
    inner = replace(outer, config=config, run=run, pruned_from=outer.pruned_from)
    with run.lock():
        _adopt_config(inner, accept_changes=True)
        for name, target in shared.items():
            link, place = run.path / name, os.path.relpath(target.resolve(), run.path.resolve())
            if link.is_symlink() and link.readlink() != Path(place):
                link.unlink()
            if not link.is_symlink():
                link.symlink_to(place, target_is_directory=True)
        rows = [stage for stage in stages_of(config) if stage.name in stages]
        plans = plan_shapes(config, inner.model_to_prune) if STAGES["plan"] in rows else []
        check_disk(inner, rows, student_parameters(inner, plans))
        for stage in rows:
            changed |= _guarded(stage, inner)
    from kdscale.runtime.device import release_memory  # it loads torch

    release_memory()  # the engine of a finished distillation, which the next step needs
    return changed

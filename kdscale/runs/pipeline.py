"""The stages of a run, in order, and the one function that brings a run up to a given stage."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kdscale.config import Config
from kdscale.distill import sequence_check, tensor_check
from kdscale.errors import ConfigError, Interrupted, KdscaleError, RunFolderError
from kdscale.files import explain_os_errors, remove_leftovers
from kdscale.progress import Reporter
from kdscale.runs import choose, work
from kdscale.runs.folder import RunFolder
from kdscale.runs.stage import Context, Stage, run_stage
from kdscale.tracking import check_trackers

if TYPE_CHECKING:
    from kdscale.prune.plan import Plan

# Bytes a parameter: a student on disk at most; a checkpoint's fp32 master and two Adam moments.
_STUDENT_BYTES, _CHECKPOINT_BYTES = 4, 12

_CODE = ("teacher.trust_remote_code",)

STAGES: tuple[Stage, ...] = (
    Stage("data", "tokenise the text", ("data",), (), ("data",), work.tokenize, reads_teacher=True),
    Stage(
        "importance", "measure importance", ("importance", "seed", *_CODE), ("data",), ("importance",),
        work.measure_importance, reads_teacher=True, derived=work.axes_to_score, resumable=True,
    ),
    Stage(
        "plan", "choose the student's shape", ("prune",), ("importance",), ("plan.json",), work.choose_plan,
        reads_teacher=True, hand_editable=True, derived=choose.what_matters,
    ),
    Stage(
        "prune", "prune and check", ("prune", "importance", "seed", *_CODE), ("plan.json", "importance", "data"),
        ("pruned",), work.prune_and_check, reads_teacher=True, resumable=True,
    ),
    Stage(
        "distill", "distil the teacher into the student", ("seed", *_CODE), ("pruned", "data"), ("student",),
        work.distill, reads_teacher=True, derived=work.what_distillation_depends_on,
        scratch=("checkpoints", "logs/metrics.jsonl", "logs/bad_batches.jsonl", "logs/tensorboard"),
    ),
    Stage(
        "eval", "evaluate side by side", ("eval", "seed", *_CODE), ("pruned", "student", "data"), ("eval",),
        work.evaluate, reads_teacher=True,
    ),
    Stage(
        "report", "write the report", ("name",),
        ("plan.json", "importance", "pruned/config.json", "repair.json", "eval", "logs/metrics.jsonl"), ("report",),
        work.write_report,
    ),
)  # fmt: skip
STAGE_NAMES = tuple(stage.name for stage in STAGES)


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
    tensor_check.check_models(distill.tensor_parallel, {"teacher": teacher})
    sequence_check.check_models(distill.sequence_parallel, distill.seq_len, {"teacher": teacher})
    for plan in plans:
        tensor_check.check_dims(distill.tensor_parallel, "student", plan.student.dims())
        sequence_check.check_dims(distill.sequence_parallel, "student", plan.student.dims())
    with run.lock(), _signals_as_exceptions():
        changes = run.adopt_config(config, accept_changes)
        for change in changes:
            reporter.say(f"  config changed: {change}")
        for folder in (run.logs, run.checkpoints, run.stages):
            if folder.exists():
                remove_leftovers(folder)
        context = Context(config, run, teacher, reporter)
        check_disk(context)
        did = False
        for stage in STAGES[: STAGE_NAMES.index(last) + 1]:
            if stage.name == STAGE_NAMES[1] and config.steps:
                from kdscale.runs.steps import run_steps

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


def check_teacher(config: Config) -> Path:
    """Everything about the teacher that can be known without reading its weights. Returns its folder."""
    from kdscale.weights import check_tokenizer, resolve_teacher

    folder = resolve_teacher(config.teacher)
    checkpoint, family = work.open_teacher(folder)
    check_tokenizer(folder, family.dims(checkpoint.config).vocab)
    return folder


def _refuse_hopeless_paths(path: Path) -> None:
    """The nearest existing parent must be a folder."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError("run_dir", expected="a folder (new or empty)", got=f"{parent} is a file")


def check_disk(context: Context) -> None:
    """Refuse before any work when the disk cannot hold what is still to be written.

    Counted: the pruned and the final student, keep+1 checkpoints, and those that `keep_every` keeps.
    """
    run, config = context.run, context.config
    if (run.stages / "distill.json").exists():
        return
    params = _student_params(context)
    settings, steps = config.distill, config.distill.tokens // (config.distill.global_batch * config.distill.seq_len)
    count = settings.keep_checkpoints + 1 + (steps // settings.keep_every if settings.keep_every else 0)
    held = sum(item.stat().st_size for item in run.path.rglob("*") if item.is_file())
    needed = 2 * params * _STUDENT_BYTES + count * params * _CHECKPOINT_BYTES + (64 << 20) - held
    free = shutil.disk_usage(run.path).free
    if needed > free:
        raise RunFolderError(
            f"run folder {run.path} is on a disk without room",
            expected=f"{needed / 1e9:.1f} GB free (two students and {count} checkpoints)",
            got=f"{free / 1e9:.1f} GB",
            hint="free some space, choose another run_dir, lower distill.keep_checkpoints or raise distill.keep_every",
        )


def _student_params(context: Context) -> int:
    """Parameters of the student: from the plan, or from a plan of shapes only before there is one."""
    from kdscale.prune.plan import Plan

    if context.run.plan.exists():
        return Plan.load(context.run.plan).student_params.total
    plans = plan_shapes(context.config, context.source)
    if len(plans) == len(context.config.steps) + 1:
        return plans[-1].student_params.total
    teacher, family = work.open_teacher(context.source)  # under a latency target: no larger than the teacher
    return family.count_params(teacher.config).total


def plan_shapes(config: Config, teacher: Path) -> list[Plan]:
    """A plan for each step and the config's own, from the teacher's config.json alone.

    Ends before the first one whose target is a latency, which has to be measured. Raises ConfigError when a budget
    cannot be met.
    """
    from kdscale.families import load_family
    from kdscale.prune.plan import make_plan
    from kdscale.weights import read_config

    model, out = read_config(teacher), []
    for one in (*(config.step(index) for index in range(len(config.steps))), config):
        if one.prune.target_decode is not None or one.prune.target_prefill is not None:
            break
        family = load_family(model, str(teacher / "config.json"))
        out.append(make_plan(model, family, None, one.prune))
        model = family.student_config(model, out[-1].student.dims(), out[-1].kept.layers)
    return out


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGINT and SIGTERM become Interrupted wherever the work happens to be, so that temporary folders are removed."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
